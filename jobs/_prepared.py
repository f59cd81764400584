"""The rows of a chunk as they are written, and why those that are not are refused."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from db.batch import Batch, Layout, Record, make_batch
from db.refusal import Refusal
from jobs._references import Reference
from jobs._wording import MASK


@dataclass
class Prepared:
    """A chunk's rows, ready to be written: `records[i]` is made of row `positions[i]`.

    `unknown` are the keys by which rows, refused for now, name rows that are still to be made.
    By record, `keys` are those that were drawn for them in an `epoch`, if so; `given` are the
    fields of those that do not give all that the input gives, `expected` the versions they count
    on.
    """

    layout: Layout
    positions: list[int] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    refused: dict[int, Refusal] = field(default_factory=dict)
    filtered: int = 0
    unknown: dict[Reference, set[str]] = field(default_factory=dict)
    keys: Sequence[int] | None = None
    epoch: int | None = None
    given: dict[int, frozenset[str]] = field(default_factory=dict)
    expected: dict[int, int] = field(default_factory=dict)

    def masked(self, index: int, why: Refusal) -> Refusal:
        """What PostgreSQL said of a record without its sensitive values, which a trigger quotes."""
        message = why.message
        for at in self.layout.sensitive:
            if secret := self.records[index][at]:
                message = message.replace(str(secret), MASK)
        return why if message == why.message else replace(why, message=message)

    @cached_property
    def batch(self) -> Batch:
        """The records as they are sent; made when it is first asked for."""
        return make_batch(self.records, self.layout, self.keys)

    def until(self, end: int) -> "Prepared":
        """The part of it that stands before row `end`."""
        count = bisect_left(self.positions, end)
        return Prepared(
            self.layout,
            self.positions[:count],
            self.records[:count],
            {position: why for position, why in self.refused.items() if position < end},
            given={at: given for at, given in self.given.items() if at < count},
            expected={at: version for at, version in self.expected.items() if at < count},
        )
