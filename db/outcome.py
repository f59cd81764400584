"""What became of the rows of a chunk, and the check that it is told of each."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Self

from db.errors import BulwarkError
from db.ledger.audit import Keys
from db.ledger.verdict import Verdict
from db.refusal import AMBIGUOUS, NOT_THERE, OUTDATED, Refusal

MOST_NAMED = 10
_VERDICTS = {
    AMBIGUOUS: Verdict.CONFLICT,
    OUTDATED: Verdict.CONFLICT,
    NOT_THERE: Verdict.MISSING,
}


def verdict_of(refusal: Refusal) -> Verdict:
    """What the verdict of a row is: a valid one may not agree with what is there."""
    return _VERDICTS.get(refusal.code, Verdict.REJECTED)


class Written(ABC):
    """What became of the rows, by their position: each has one verdict, or was refused."""

    refused: dict[int, Refusal]

    @abstractmethod
    def taken(self) -> Mapping[Verdict, Collection[int]]:
        """The rows that were not refused, by verdict."""

    @property
    def inserted_keys(self) -> Keys | None:
        """The keys of the rows that are new, if rows may be."""
        return None

    @property
    def changed(self) -> Mapping[str, int]:
        """How many rows that were there were changed, by the action that the audit tells."""
        return {}

    @property
    def changed_along(self) -> Mapping[str, Mapping[str, int]]:
        """By table, how many rows of others were changed with them, by action."""
        return {}

    def wrote(self, field_name: str, update: frozenset[str] | None) -> Collection[int]:
        """The rows of which this field went into the table; `update` may be about certain ones."""
        raise NotImplementedError(f"{type(self).__name__} creates no rows that {field_name} names")

    def accounting_for(self, rows: int) -> Self:
        """The same; Miscounted unless each of so many rows has exactly one outcome."""
        told = sorted(chain(self.refused, *self.taken().values()))
        if told != list(range(rows)):
            twice = sorted({one for one, next_one in pairwise(told) if one == next_one})
            counts = [f"{len(taken)} {verdict}" for verdict, taken in self.taken().items()]
            raise Miscounted(
                f"{len(told)} outcomes were told for {rows} rows ({', '.join(counts)}, "
                f"{len(self.refused)} refused): without an outcome "
                f"are the positions {sorted(set(range(rows)) - set(told))[:MOST_NAMED]}, with two "
                f"of them {twice[:MOST_NAMED]}; nothing of this chunk is kept, please report it"
            )
        return self


@dataclass(frozen=True)
class Inserted(Written):
    """Rows that were new, or passed over."""

    keys: Keys
    inserted: frozenset[int] = frozenset()
    skipped: frozenset[int] = frozenset()
    refused: dict[int, Refusal] = field(default_factory=dict)

    @property
    def inserted_keys(self) -> Keys:
        return self.keys

    def taken(self) -> Mapping[Verdict, Collection[int]]:
        return {Verdict.INSERTED: self.inserted, Verdict.SKIPPED: self.skipped}

    def wrote(self, field_name: str, update: frozenset[str] | None) -> Collection[int]:
        return self.inserted


class Miscounted(BulwarkError):
    """The outcomes of a chunk's rows do not add up: an error of Bulwark itself."""
