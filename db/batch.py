"""Rows on their way into a table: as values, and as the lines of COPY's text format.

A driver that encodes while it sends keeps the server waiting. Lines that are made beforehand, in a
thread, cost the sender next to nothing, and the server works from the first byte on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

Record = tuple[Any, ...]

_NULL: Final = r"\N"
_SPECIAL: Final = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})
_WRITTEN_AS_READ: Final = {int, float, bool, Decimal, date, datetime, UUID}
"""Types that PostgreSQL reads as Python writes them, whatever the session's settings."""


@dataclass(frozen=True)
class Batch:
    """Rows by position, and the order in which they are best inserted.

    `lines` end before the newline; there are none where some value has no form as text that
    PostgreSQL would read.
    """

    records: Sequence[Record]
    order: Sequence[int]
    lines: list[str] | None

    def __len__(self) -> int:
        return len(self.records)

    def part(self, positions: Sequence[int]) -> "Batch":
        """Some of the rows, in ascending order of their positions."""
        numbers = {position: number for number, position in enumerate(positions)}
        return Batch(
            [self.records[at] for at in positions],
            [numbers[at] for at in self.order if at in numbers],
            None if self.lines is None else [self.lines[at] for at in positions],
        )


def make_batch(records: Sequence[Record], key: Callable[[Record], Any] | None = None) -> Batch:
    """Sort and write rows out; it takes its time, and belongs in a thread."""
    order: Sequence[int] = range(len(records))
    if key is not None:
        order = _sorted(list(map(key, records)))
    return Batch(records, order, _lines(records))


def _sorted(keys: list[Any]) -> list[int]:
    """Positions by key, or by how it is written where keys cannot be compared."""
    try:
        return sorted(range(len(keys)), key=keys.__getitem__)
    except TypeError:
        return sorted(range(len(keys)), key=list(map(_comparable, keys)).__getitem__)


def _comparable(key: Any) -> list[tuple[bool, str]]:
    """Nulls last, as PostgreSQL has them."""
    values = key if isinstance(key, tuple) else (key,)
    return [(value is None, "" if value is None else str(value)) for value in values]


def _lines(records: Sequence[Record]) -> list[str] | None:
    columns = []
    for column in zip(*records, strict=True):
        texts = _texts(column)
        if texts is None:
            return None
        columns.append(texts)
    return list(map("\t".join, zip(*columns, strict=True)))


def _texts(column: Sequence[Any]) -> Sequence[str] | None:
    types = set(map(type, column))
    nulls = type(None) in types
    types.discard(type(None))
    if types <= {str}:
        return _escaped(column, nulls=nulls)
    if not types <= _WRITTEN_AS_READ:
        return None
    if nulls:
        return [_NULL if value is None else str(value) for value in column]
    return list(map(str, column))


def _escaped(column: Sequence[Any], *, nulls: bool) -> Sequence[str]:
    together = "".join(filter(None, column) if nulls else column)
    if any(char in together for char in "\\\t\n\r"):
        return [_NULL if value is None else value.translate(_SPECIAL) for value in column]
    return [_NULL if value is None else value for value in column] if nulls else column
