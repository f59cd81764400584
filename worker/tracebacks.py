"""Tracebacks as they may be logged: every error of a chain, and no value that one of them quotes.

PostgreSQL puts the key of a row into DETAIL, Pydantic the input into its message.
"""

import traceback
from collections.abc import Iterator
from typing import Final

import asyncpg
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError
from structlog.typing import ExcInfo

from db.retry import describe
from jobs._problems import problems_of, said

_CAUSE: Final = "\nThe above exception was the direct cause of the following exception:\n\n"
_CONTEXT: Final = "\nDuring handling of the above exception, another exception occurred:\n\n"
_MOST_ERRORS: Final = 20
_QUOTING: Final = (
    SQLAlchemyError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)


def without_values(exc_info: ExcInfo) -> str:
    """What Python would print, but for the values of rows."""
    return "".join(_lines(exc_info[1])).rstrip("\n")


def _lines(error: BaseException) -> Iterator[str]:
    for one, link in _chain(error):
        yield "Traceback (most recent call last):\n"
        yield from traceback.format_tb(one.__traceback__)
        yield f"{_told(one)}\n"
        if isinstance(one, BaseExceptionGroup):
            for inner in one.exceptions:
                within = "".join(_lines(inner)).splitlines(keepends=True)
                yield from ("  within it:\n", *(f"  {line}" for line in within))
        yield link


def _chain(error: BaseException) -> list[tuple[BaseException, str]]:
    """What led to the error and then itself, each with the words that lead to the next."""
    found: list[tuple[BaseException, str]] = [(error, "")]
    while len(found) < _MOST_ERRORS:
        last = found[-1][0]
        link, before = _CAUSE, last.__cause__
        if before is None and not last.__suppress_context__:
            link, before = _CONTEXT, last.__context__
        if before is None:
            break
        found.append((before, link))
    return found[::-1]


def _told(error: BaseException) -> str:
    if isinstance(error, _QUOTING):
        return describe(error)
    if isinstance(error, ValidationError):
        places = [(".".join(map(str, one["loc"])), said(one)) for one in problems_of(error)]
        return f"{error.title}: " + "; ".join(f"{place}: {why}" for place, why in places)
    return "".join(traceback.format_exception_only(error)).rstrip("\n")
