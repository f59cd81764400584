"""Fields that are made from columns, as by --map FIELD='{column}, {column}'."""

import json
from collections.abc import Callable, Iterator, Sequence
from string import Formatter
from typing import Any

from jobs._errors import InputError
from jobs._part import ABSENT, Values


def pieces_of(template: str, place: str) -> Iterator[tuple[str, str | None]]:
    """Each literal with the column behind it. Raises InputError, which names the place."""
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"{place}: {error}; write {{{{ for a brace") from None
    for literal, name, spec, conversion in parsed:
        column = f"{name}!{conversion}" if name and conversion else name
        yield literal, f"{column}:{spec}" if column and spec else column


def filler(pieces: Sequence[tuple[str, int | None]]) -> Callable[[Values], str | None]:
    """What makes a row's field of literals and the columns behind them; None if it is empty."""

    def fill(values: Values) -> str | None:
        text = "".join(
            literal + ("" if index is None else as_text(values[index])) for literal, index in pieces
        )
        return text or None

    return fill


def as_text(value: Any) -> str:
    """The value as a CSV would have it; one that is no text as JSON has it."""
    if value is None or value is ABSENT:
        return ""
    if isinstance(value, (bool, int, float, list, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
