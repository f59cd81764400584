"""What is asked of rows that may meet others which are there: the terms of an upsert."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from db.ledger.audit import Journal
from db.staging import OnConflict

OnDeleted = Literal["insert", "revive", "reject"]


@dataclass(frozen=True)
class Merging:
    """What becomes of a row that meets one that is there, or was.

    `update` are the columns to overwrite, None for all that a row gives. A row with an expected
    version takes effect only on a row of that version.
    """

    on_conflict: OnConflict
    journal: Journal
    on_deleted: OnDeleted = "insert"
    update: frozenset[str] | None = None
    sensitive: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Given:
    """What the rows give: `usual` columns, but for those of which `uneven` says otherwise.

    `expected` are the versions that rows count on. Both are by position.
    """

    usual: frozenset[str]
    uneven: Mapping[int, frozenset[str]] = field(default_factory=dict)
    expected: Mapping[int, int] = field(default_factory=dict)

    def kinds(self) -> list[frozenset[str]]:
        """Every set of columns that some row gives, the usual one first."""
        return list(dict.fromkeys([self.usual, *self.uneven.values()]))
