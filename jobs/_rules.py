"""What was asked of an import, whatever is in its rows."""

from collections.abc import Mapping
from dataclasses import dataclass

from db.ledger.audit import Journal
from db.ledger.verdict import Verdict
from db.merging import Merging, OnDeleted
from db.registry import Model
from db.staging import OnConflict
from jobs._preparation import OnMissing


@dataclass(frozen=True)
class Rules:
    """How large a chunk may be, what becomes of rows that meet others, and how many rejects go."""

    chunk_rows: int
    chunk_bytes: int
    on_conflict: OnConflict
    max_rejects: int | None
    on_deleted: OnDeleted = "insert"
    on_missing: OnMissing = "reject"
    update: frozenset[str] | None = None
    expects_version: bool = False
    atomic: bool = False

    def rejects(self, counts: Mapping[str, int]) -> int:
        """How many rows count as rejected: where all must go in, those in conflict too."""
        conflicts = counts.get(Verdict.CONFLICT, 0) if self.atomic else 0
        return counts.get(Verdict.REJECTED, 0) + conflicts

    @property
    def looks_first(self) -> bool:
        """Whether a row that PostgreSQL would take may still have to be treated otherwise."""
        return self.on_deleted != "insert" or self.expects_version

    @property
    def merges(self) -> bool:
        """Whether rows that are there may be changed."""
        return self.looks_first or self.on_conflict == "update"

    def merging(self, model: Model, journal: Journal) -> Merging:
        return Merging(
            self.on_conflict, journal, self.on_deleted, self.update, model.sensitive_columns
        )
