"""Rows as a reader finds them, and how they become the parts of an input."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from typing import TypeVar, overload

from db.ledger.chunk import Span
from db.refusal import Refusal
from jobs._part import Part, Position, Values
from jobs._sources.lines import LongLine, line_count

T = TypeVar("T")


@dataclass(slots=True)
class Lot:
    """Rows with their bytes, first lines, the byte behind each, and the faults by index.

    `clean` says that every byte is UTF-8 and none is NUL; `complete` that no value is absent.
    """

    rows: Sequence[Values]
    raws: Sequence[bytes]
    lines: Sequence[int]
    ends: Sequence[int]
    faults: dict[int, Refusal] = field(default_factory=dict)
    clean: bool = True
    complete: bool = True


def too_long(long: LongLine, line: int, end_byte: int, max_bytes: int) -> Lot:
    """The lot of one line that is too long to be a row."""
    message = (
        f"The row has {long.size_bytes} bytes in one line and at most {max_bytes} are allowed;"
        f" shorten it (only its first {len(long.head)} bytes are kept here)."
    )
    fault = Refusal("row_too_large", message)
    return Lot([("",)], [long.head], [line], [end_byte], {0: fault}, clean=False)


def parts_of(lots: Iterable[Lot], start: Position, max_rows: int, max_bytes: int) -> Iterator[Part]:
    """The rows in parts that end at `max_rows` or as soon as `max_bytes` are reached.

    The boundaries depend on the input and the two limits alone, so that a restart at the end of
    any part gives the same parts as an uninterrupted read.
    """
    cutter = _Cutter(start, max_rows, max_bytes)
    for lot in lots:
        yield from cutter.cut(lot)
    yield from cutter.rest()


@dataclass(slots=True)
class _Piece:
    """Consecutive rows of a lot."""

    lot: Lot
    first: int
    stop: int


class _Cutter:
    """Collects rows until a part is full."""

    def __init__(self, start: Position, max_rows: int, max_bytes: int) -> None:
        if max_rows < 1 or max_bytes < 1:
            raise ValueError("A chunk holds at least 1 row and 1 byte; raise the limit.")
        self._position = start
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._pieces: list[_Piece] = []
        self._count = 0

    def cut(self, lot: Lot) -> Iterator[Part]:
        """Add rows, and give the parts that they complete."""
        at = 0
        while at < len(lot.rows):
            full_at_byte = self._position.byte + self._max_bytes
            last = bisect_left(lot.ends, full_at_byte, at) + 1
            stop = min(at + self._max_rows - self._count, last, len(lot.rows))
            self._pieces.append(_Piece(lot, at, stop))
            self._count += stop - at
            at = stop
            if self._count == self._max_rows or lot.ends[stop - 1] >= full_at_byte:
                yield self._part()

    def rest(self) -> Iterator[Part]:
        """Give the last part, if rows are left for one."""
        if self._pieces:
            yield self._part()

    def _part(self) -> Part:
        pieces, start = self._pieces, self._position
        last = pieces[-1]
        end_byte = last.lot.ends[last.stop - 1]
        next_line = last.lot.lines[last.stop - 1] + line_count(last.lot.raws[last.stop - 1])
        part = Part(
            start.chunk_no,
            Span(start.row, self._count, start.byte, end_byte, start.line, next_line),
            rows=_joined([one.lot.rows[one.first : one.stop] for one in pieces]),
            lines=_joined_lines([one.lot.lines[one.first : one.stop] for one in pieces]),
            raws=_Raws(pieces),
            faults=_faults(pieces),
            complete=all(one.lot.complete for one in pieces),
        )
        self._position, self._pieces, self._count = part.next, [], 0
        return part


class _Raws(Sequence[bytes]):
    """The bytes of a part's rows, which only those that were refused are asked for."""

    def __init__(self, pieces: list[_Piece]) -> None:
        self._pieces = pieces
        self._stops = list(accumulate(one.stop - one.first for one in pieces))

    def __len__(self) -> int:
        return self._stops[-1]

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        number = bisect_right(self._stops, position)
        piece = self._pieces[number]
        return piece.lot.raws[piece.stop - self._stops[number] + position]


def _joined(pieces: list[Sequence[T]]) -> Sequence[T]:
    return pieces[0] if len(pieces) == 1 else list(chain.from_iterable(pieces))


def _joined_lines(pieces: list[Sequence[int]]) -> Sequence[int]:
    """The lines as a range where each has one row."""
    touching = all(one[-1] + 1 == following[0] for one, following in pairwise(pieces))
    if touching and all(isinstance(one, range) for one in pieces):
        return range(pieces[0][0], pieces[-1][-1] + 1)
    return _joined(pieces)


def _faults(pieces: list[_Piece]) -> dict[int, Refusal]:
    """The faults by the position of the row in the part."""
    found: dict[int, Refusal] = {}
    before = 0
    for one in pieces:
        for index, fault in one.lot.faults.items():
            if one.first <= index < one.stop:
                found[before + index - one.first] = fault
        before += one.stop - one.first
    return found
