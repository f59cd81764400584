"""Rows on their way into a table: as values, and as the lines of COPY's text format.

A driver that encodes while it sends keeps the server waiting. Lines that are made beforehand, in a
thread, cost the sender next to nothing, and the server works from the first byte on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Final
from uuid import UUID

Record = tuple[Any, ...]


class Default:
    """In place of a value: the row leaves the column to the database."""


DEFAULT: Final = Default()

_NULL: Final = r"\N"
_SPECIAL: Final = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})
_GAPS: Final[frozenset[type]] = frozenset({type(None), Default})
_INTEGERS: Final = frozenset({"int2", "int4", "int8"})
_FLOATS: Final = frozenset({"float4", "float8"})
_TEXTS: Final = frozenset({"text", "varchar", "bpchar", "json", "jsonb", "enum"})
_WITHOUT_ENCODER: Final = frozenset(
    {"extension", "xml", "tsvector", "tsquery", "jsonpath", "macaddr", "macaddr8", "money"}
)
"""Types that the driver cannot send in binary; text is the only way."""
_WRITTEN_AS_READ: Final[Mapping[type, frozenset[str]]] = MappingProxyType(
    {
        str: _TEXTS | _WITHOUT_ENCODER,
        int: _INTEGERS | _FLOATS | {"numeric"},
        float: _FLOATS,
        Decimal: frozenset({"numeric"}),
        bool: frozenset({"bool"}),
        date: frozenset({"date"}),
        datetime: frozenset({"timestamp", "timestamptz"}),
        UUID: frozenset({"uuid"}),
    }
)
"""By Python type, the types whose values PostgreSQL reads from text as the driver encodes them."""


@dataclass(frozen=True)
class Layout:
    """The types of the columns that rows have, as PostgreSQL names them, and what to sort by.

    `sensitive` are the positions of columns whose values no message may quote.
    """

    types: Sequence[str]
    order_by: Callable[[Record], Any] | None = None
    sensitive: Sequence[int] = ()


@dataclass(frozen=True)
class Batch:
    """Rows by position, and the order in which they are best inserted.

    Their cells stand in `texts` by column, unless some value has no form as text that PostgreSQL
    would read. Where every row has every value they stand in `lines` instead, which end before the
    newline, and begin with the row's key where `keys` were drawn.
    """

    records: Sequence[Record]
    order: Sequence[int]
    lines: list[str] | None
    texts: list[Sequence[str]] | None
    keys: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.records)

    @property
    def written(self) -> bool:
        """Whether there is a line of each row."""
        return self.lines is not None or self.texts is not None

    def line(self, at: int, places: Sequence[int] = ()) -> str:
        """A row's line without its key, or what is in it at some places if some values are not."""
        if self.lines is not None:
            line = self.lines[at]
            return line if self.keys is None else line.partition("\t")[2]
        assert self.texts is not None
        return "\t".join([self.texts[place][at] for place in places])

    def part(self, positions: Sequence[int]) -> "Batch":
        """Some of the rows, in ascending order of their positions."""
        numbers = {position: number for number, position in enumerate(positions)}
        texts = self.texts
        return Batch(
            [self.records[at] for at in positions],
            [numbers[at] for at in self.order if at in numbers],
            None if self.lines is None else [self.lines[at] for at in positions],
            None if texts is None else [[column[at] for at in positions] for column in texts],
            None if self.keys is None else [self.keys[at] for at in positions],
        )


def make_batch(
    records: Sequence[Record], layout: Layout, keys: Sequence[int] | None = None
) -> Batch:
    """Sort and write rows out; it takes its time, and belongs in a thread."""
    order: Sequence[int] = range(len(records))
    if layout.order_by is not None:
        order = _sorted(list(map(layout.order_by, records)))
    columns = list(zip(*records, strict=True))
    kinds = [set(map(type, column)) for column in columns]
    texts = _texts(columns, kinds, layout.types)
    if texts is None or any(Default in kind for kind in kinds):
        return Batch(records, order, None, texts)
    if keys is not None:
        texts.insert(0, list(map(str, keys)))
    return Batch(records, order, list(map("\t".join, zip(*texts, strict=True))), None, keys)


def batch_of_texts(columns: Sequence[Sequence[str | None]]) -> Batch:
    """Rows whose values are text that PostgreSQL wrote, so that it reads the very same values."""
    records = list(zip(*columns, strict=True))
    texts = [_escaped(column, gaps=True) for column in columns]
    return Batch(records, range(len(records)), None, texts)


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


def _texts(
    columns: Sequence[Sequence[Any]], kinds: Sequence[set[type]], types: Sequence[str]
) -> list[Sequence[str]] | None:
    """The cells by column, as PostgreSQL would read what the driver would send; None if it cannot.

    So no cell depends on what else is in its column.
    """
    for column, kind, name in zip(columns, kinds, types, strict=bool(columns)):
        if not all(name in _WRITTEN_AS_READ.get(one, ()) for one in kind - _GAPS):
            return None
        if datetime in kind and not _zoned_alike(column, zoned=name == "timestamptz"):
            return None
    return [_cells(column, kind) for column, kind in zip(columns, kinds, strict=True)]


def _cells(column: Sequence[Any], kind: set[type]) -> Sequence[str]:
    if kind - _GAPS <= {str}:
        return _escaped(column, gaps=bool(kind & _GAPS))
    if kind & _GAPS:
        return [_NULL if value is None or value is DEFAULT else str(value) for value in column]
    return list(map(str, column))


def _zoned_alike(column: Sequence[Any], *, zoned: bool) -> bool:
    times = [value for value in column if isinstance(value, datetime)]
    return all((time.tzinfo is not None) == zoned for time in times)


def _escaped(column: Sequence[Any], *, gaps: bool) -> Sequence[str]:
    given = [value for value in column if isinstance(value, str)] if gaps else column
    together = "".join(given)
    special = any(char in together for char in "\\\t\n\r")
    if not gaps:
        return [value.translate(_SPECIAL) for value in column] if special else column
    if special:
        return [value.translate(_SPECIAL) if isinstance(value, str) else _NULL for value in column]
    return [value if isinstance(value, str) else _NULL for value in column]
