"""What every input is cut into: consecutive rows, as one chunk of the job."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from db.ledger.chunk import Span
from db.refusal import Refusal

Values = Sequence[Any]
"""A row's values by column: None is NULL, ABSENT a column that the row does not have."""


class _Absent:
    pass


ABSENT: Final = _Absent()
"""In place of a value: this row says nothing about the column."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where to continue: the numbers of the next chunk, row, byte and line."""

    chunk_no: int
    row: int
    byte: int
    line: int


@dataclass(frozen=True)
class Part:
    """Rows by position, numbered from 0; the parts of an input are numbered from 1.

    A row in `faults` could not be split into values: it has none that mean anything. `lines` are
    those on which the rows begin, `raws` their exact bytes. A `complete` part has no ABSENT value.
    """

    number: int
    span: Span
    rows: Sequence[Values]
    lines: Sequence[int]
    raws: Sequence[bytes]
    faults: Mapping[int, Refusal]
    complete: bool = True

    @property
    def start(self) -> Position:
        """Where a reader has to start in order to get this part again."""
        at = self.span
        return Position(self.number, at.first_row, at.start_byte, at.first_line)

    @property
    def next(self) -> Position:
        """Where a reader has to start in order to get the part behind this one."""
        at = self.span
        return Position(self.number + 1, at.first_row + at.rows, at.end_byte, at.next_line)
