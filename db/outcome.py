"""What became of the rows of a chunk, and the check that it is told of each."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

from db.errors import BulwarkError
from db.ledger.audit import Keys
from db.refusal import Refusal

MOST_NAMED = 10


@dataclass(frozen=True)
class Inserted:
    """What became of the rows, by their position: each is in exactly one of the three."""

    keys: Keys
    inserted: frozenset[int] = frozenset()
    skipped: frozenset[int] = frozenset()
    refused: dict[int, Refusal] = field(default_factory=dict)

    def positions(self) -> list[int]:
        """Those of all rows that have an outcome, as often as they have one."""
        return [*self.inserted, *self.skipped, *self.refused]

    def accounting_for(self, rows: int) -> Self:
        """The same; Miscounted unless each of so many rows has exactly one outcome."""
        told = sorted(self.positions())
        if told != list(range(rows)):
            twice = sorted({one for one, next_one in pairwise(told) if one == next_one})
            raise Miscounted(
                f"{len(told)} outcomes were told for {rows} rows ({len(self.inserted)} inserted, "
                f"{len(self.skipped)} skipped, {len(self.refused)} refused): without an outcome "
                f"are the positions {sorted(set(range(rows)) - set(told))[:MOST_NAMED]}, with two "
                f"of them {twice[:MOST_NAMED]}; nothing of this chunk is kept, please report it"
            )
        return self


class Miscounted(BulwarkError):
    """The outcomes of a chunk's rows do not add up: an error of Bulwark itself."""
