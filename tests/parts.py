"""Inputs in memory, and the parts that readers make of them, row by row."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from db.ledger.chunk import Span
from db.refusal import Refusal
from jobs._part import Part


class Bytes(NamedTuple):
    """A source over bytes, in blocks as small as a test wants them."""

    data: bytes
    block_bytes: int = 256 * 1024

    def blocks(self, offset: int = 0) -> Iterator[bytes]:
        for at in range(offset, len(self.data), self.block_bytes):
            yield self.data[at : at + self.block_bytes]


class StoredBytes(NamedTuple):
    """What is stored as it is in memory, given out in pieces as small as a test wants them."""

    data: bytes
    block_bytes: int = 256 * 1024

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def read_at(self, offset: int, most_bytes: int) -> bytes:
        return self.data[offset : offset + min(most_bytes, self.block_bytes)]


class Record(NamedTuple):
    """One row: the line it starts on, its values or its fault, and exactly its bytes."""

    line: int
    values: list[Any] | None
    raw: bytes
    fault: Refusal | None


def records_of(part: Part) -> list[Record]:
    return [
        Record(line, None if at in part.faults else list(values), raw, part.faults.get(at))
        for at, (line, values, raw) in enumerate(zip(part.lines, part.rows, part.raws, strict=True))
    ]


def all_records(parts: Iterable[Part]) -> list[Record]:
    return [record for part in parts for record in records_of(part)]


def comparable(parts: Sequence[Part]) -> list[tuple[int, Span, list[Record]]]:
    """Parts without the difference between a list, a range and a view."""
    return [(part.number, part.span, records_of(part)) for part in parts]
