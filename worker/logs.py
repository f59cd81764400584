"""Logs: one event a line on stderr, as JSON or for a terminal, with nothing secret in it."""

import json
import logging
import re
import sys
from collections.abc import Mapping
from typing import Any, Final, Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from worker.tracebacks import without_values

Level = Literal["debug", "info", "warning", "error", "critical"]
Format = Literal["auto", "json", "console"]

MASK: Final = "***"
_QUIET_LIBRARIES: Final = ("arq", "sqlalchemy", "redis", "asyncpg", "alembic", "asyncio")
_SECRET_KEY: Final = re.compile(
    r"(^|_)(password|passwd|pwd|secret|token|credentials?|authorization|cookie|dsn"
    r"|api_?key|private_?key|(database|redis)_url)s?(_|$)",
    re.IGNORECASE,
)
_URL_PASSWORD: Final = re.compile(r"(\w://[^\s:/@]*:)[^\s/]+(?=@)")
_FIRST: Final = ("timestamp", "level", "event")


def configure_logs(level: Level = "info", log_format: Format = "auto") -> None:
    """Send the events of Bulwark and of the libraries below it to stderr; calling again replaces.

    What arq's own command line has set up for its logger is undone, whenever this runs after it.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    handler = _Handler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=_rendering(log_format), foreign_pre_chain=[_from_library, *_SHARED]
        )
    )
    root = logging.getLogger()
    for old in [one for one in root.handlers if isinstance(one, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(number)
    for name in _QUIET_LIBRARIES:
        _quieten(logging.getLogger(name), number)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            *_SHARED,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(number),
        cache_logger_on_first_use=False,
    )


class _Handler(logging.StreamHandler[Any]):
    """Tells the handler set up here from those of others."""


def mask(value: Any, key: str = "") -> Any:
    """The value as it may be shown: nothing under a key of secrets, no password inside a URL."""
    if _SECRET_KEY.search(key) and value is not None:
        return MASK
    if isinstance(value, str):
        return _URL_PASSWORD.sub(rf"\1{MASK}", value)
    if isinstance(value, Mapping):
        return {name: mask(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [mask(inner) for inner in value]
    return value


def _masked(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    return {key: value if key.startswith("_") else mask(value, key) for key, value in event.items()}


def _ordered(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """What every line has comes first."""
    return {**{key: event[key] for key in _FIRST if key in event}, **event}


def _from_library(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Event names are constant, so what a library says is a field of one event."""
    return {**event, "message": event["event"], "event": "library.logged"}


_SHARED: Final[list[Processor]] = [
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.StackInfoRenderer(),
]


def _rendering(log_format: Format) -> list[Processor]:
    """What becomes of an event last; masking stands behind whatever may add a field."""
    in_colour = sys.stderr.isatty()
    console = log_format == "console" or (log_format == "auto" and in_colour)
    last: Processor = (
        structlog.dev.ConsoleRenderer(colors=in_colour)
        if console
        else structlog.processors.JSONRenderer(json.dumps, default=str, ensure_ascii=False)
    )
    return [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        structlog.processors.ExceptionRenderer(without_values),
        _masked,
        _ordered,
        last,
    ]


def _quieten(logger: logging.Logger, level: int) -> None:
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(max(level, logging.WARNING))
