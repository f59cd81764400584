"""What is in the columns of a sample: each one's values, and the narrowest kind they are of."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from jobs._part import ABSENT, Part

_FLAGS = {"true", "false", "yes", "no", "t", "f", "y", "n"}


@dataclass(frozen=True)
class Column:
    """A column of a sample: its kind of values, and those values, each once."""

    name: str
    kind: str
    values: tuple[Any, ...]
    empty: int


def columns_of(names: Sequence[str], part: Part) -> list[Column]:
    """The columns of a sample; rows that cannot be read do not count."""
    rows = [row for position, row in enumerate(part.rows) if position not in part.faults]
    return [_column(name, [row[index] for row in rows]) for index, name in enumerate(names)]


def _column(name: str, cells: Sequence[Any]) -> Column:
    given = [cell for cell in cells if cell is not None and cell is not ABSENT]
    values = tuple({repr(cell): cell for cell in given}.values())
    return Column(name, kind_of(values), values, len(cells) - len(given))


def kind_of(values: Sequence[Any]) -> str:
    """The narrowest kind that all values are of."""
    if not values:
        return "empty"
    if not all(isinstance(value, str) for value in values):
        return " or ".join(sorted({type(value).__name__ for value in values}))
    return next((kind for kind, fits in _KINDS.items() if all(map(fits, values))), "text")


def _matches(pattern: str) -> Callable[[str], bool]:
    whole = re.compile(pattern)
    return lambda text: whole.fullmatch(text) is not None


def _reads(parse: Callable[[str], Any]) -> Callable[[str], bool]:
    def reads(text: str) -> bool:
        try:
            parse(text)
        except ValueError:
            return False
        return True

    return reads


_KINDS: Mapping[str, Callable[[str], bool]] = {
    "int": _matches(r"[+-]?\d+"),
    "float": _matches(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"),
    "bool": lambda text: text.lower() in _FLAGS,
    "date": _reads(date.fromisoformat),
    "datetime": _reads(datetime.fromisoformat),
    "email": _matches(r"[^@\s]+@[^@\s]+\.[^@\s]+"),
}
