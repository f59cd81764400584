"""The words of `bulwark import` as they were typed: what MODEL and FILE mean, and the options."""

import shlex
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from worker.exit_codes import BadInput

_ONLY_FOR_THE_PLAN = {"plan", "as_json", "model", "file"}


def what_and_where(
    model: str | None, file: str | None, watch: Path | None, typed: Sequence[str], *, plan: bool
) -> tuple[str, str]:
    """The model, which only a plan may leave open (""), and the file or the watched folder."""
    if plan and watch is not None:
        raise BadInput("--plan looks at one file and --watch at a folder: leave one out.")
    if watch is not None and "--follow" in typed:
        raise BadInput("--follow shows one job and --watch makes many: leave one out.")
    if watch is None and (alone := sorted({"--once", "--interval-s"} & set(typed))):
        raise BadInput(f"{alone[0]} is about --watch: leave it out, or name a folder to watch.")
    if watch is not None:
        if file is not None:
            raise BadInput(f"--watch imports the files of {watch}: leave {file} out.")
        file = str(watch.absolute())
    elif plan and model is not None and file is None:
        model, file = "", model
    if model is None:
        raise BadInput("Missing argument 'MODEL'.")
    if file is None:
        raise BadInput("Missing argument 'FILE'.")
    return model, file


def typed_options(ctx: typer.Context) -> list[str]:
    """The options that were given, in their order on the help page, but not those of a plan."""
    words: list[str] = []
    for one in ctx.command.params:
        source = ctx.get_parameter_source(one.name or "")
        if one.name in _ONLY_FOR_THE_PLAN or source is None or source.name != "COMMANDLINE":
            continue
        value = ctx.params[one.name or ""]
        for each in value if isinstance(value, (list, tuple)) else [value]:
            words += [one.opts[0]] if each is True else [one.opts[0], _text(each)]
    return words


def shell_line(words: Sequence[str]) -> str:
    """The words as a shell reads them, on one line whatever is in them."""
    return " ".join(map(shell_word, words))


def shell_word(word: str) -> str:
    """The word as a shell reads it; what cannot be printed stands as its bytes."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{''.join(map(_as_bytes, escaped))}'"


def _as_bytes(sign: str) -> str:
    octets = sign.encode(errors="surrogateescape")
    return sign if sign.isprintable() else "".join(f"\\{octet:03o}" for octet in octets)


def one_line(name: str) -> str:
    """The name of a file as it is shown, without line breaks and the like."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in name)


def _text(value: Any) -> str:
    return str(value.value if isinstance(value, Enum) else value)
