"""What was asked of a bulk write, whatever is in its rows and however they are written."""

from collections.abc import Mapping
from dataclasses import dataclass

from db.ledger.verdict import Verdict
from jobs._references import OnMissing


@dataclass(frozen=True)
class Rules:
    """How large a chunk may be, how many rejects go, and whether it is all or nothing, or a trial.

    `max_rows` is how many rows the input may have. A `dry_run` ends as the job would, and changes
    nothing. The rows of a `partial` input need not give all that a row must have.
    """

    chunk_rows: int
    chunk_bytes: int
    max_rejects: int | None = None
    max_rows: int | None = None
    on_missing: OnMissing = "reject"
    update: frozenset[str] | None = None
    atomic: bool = False
    dry_run: bool = False
    partial: bool = False

    def rejects(self, counts: Mapping[str, int]) -> int:
        """How many rows count as rejected: where all must go in, those that miss theirs too."""
        refused = counts.get(Verdict.REJECTED, 0)
        if self.atomic:
            refused += counts.get(Verdict.CONFLICT, 0) + counts.get(Verdict.MISSING, 0)
        return refused

    @property
    def together(self) -> bool:
        """Whether all chunks are one transaction."""
        return self.atomic or self.dry_run
