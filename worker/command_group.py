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


class ListingGroup(TyperGroup):
    """A command that does something itself, and has subcommands: its options are not theirs.

    One that stands before a subcommand is refused, since it would have no effect there.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        found = super().resolve_command(ctx, args)
        if (command := found[1]) is not None:
            for option in self.params:
                if _is_typed(ctx, option):
                    ctx.fail(_misplaced(option, ctx.info_name, command))
        return found


def _is_typed(ctx: Any, option: Any) -> bool:
    source = ctx.get_parameter_source(option.name)
    return source is not None and source.name == "COMMANDLINE"


def _misplaced(option: Any, group: str, command: Any) -> str:
    name = option.opts[0]
    if any(name in own.opts for own in command.params):
        return f"{name} before {command.name} has no effect; put it behind {command.name}."
    return f"{command.name} has no {name}, which is an option of {group} alone."


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
