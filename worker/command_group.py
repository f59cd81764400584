"""The frame of the command line: known errors end it with one sentence and an exit code."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from worker.exit_codes import KNOWN_ERRORS, ExitCode, explain
from worker.logs import configure_logs
from worker.settings import Settings, load_settings


class CommandGroup(TyperGroup):
    """Tells every error that is known in one sentence, and lets the others keep their traceback."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        extra["standalone_mode"] = False
        try:
            code = super().main(args, *rest, **extra)
            _write_out()
            sys.exit(code)
        except typer.TyperException as error:
            end(error.format_message(), error.exit_code)
        except typer.Abort:
            sys.exit(ExitCode.INTERRUPTED)
        except KNOWN_ERRORS as error:
            if (failure := explain(error)) is None:
                raise
            if isinstance(error, OSError):
                _forget_output()
            end(failure.sentence, failure.code)


def _write_out() -> None:
    """Write what is still to be printed; end as Typer does where nobody reads it any more."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _forget_output()
        sys.exit(1)


def _forget_output() -> None:
    """Where it could not be written, Python would try and fail again at its end."""
    with suppress(OSError):
        sys.stdout.flush()
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end(sentence: str, code: int) -> NoReturn:
    """Say on stderr why the command ends, and end it."""
    typer.echo(f"bulwark: {sentence}", err=True)
    sys.exit(code)


def quiet_settings() -> Settings:
    """The settings, for a command that tells its errors itself and logs none."""
    settings = load_settings()
    configure_logs("critical", settings.log_format)
    return settings
