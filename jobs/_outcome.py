"""What became of the rows of a chunk: verdicts, counts, and what the audit has to say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from db.ledger.audit import Changes, Entry
from db.ledger.chunk import Receipt
from db.ledger.verdict import RowVerdict, Verdict
from db.outcome import Inserted
from db.refusal import Refusal
from db.upsert import CONFLICTS, REVIVE, UPDATE, Merged
from jobs._mapping import Reference
from jobs._part import Part
from jobs._preparation import Prepared
from jobs._run import ChunkEffect


@dataclass
class Outcome:
    """What became of the rows of a chunk, by their position."""

    prepared: Prepared
    written: Inserted

    @property
    def refused(self) -> dict[int, Refusal]:
        from_table = {
            self.prepared.positions[index]: why for index, why in self.written.refused.items()
        }
        return self.prepared.refused | from_table

    @property
    def rejected(self) -> list[int]:
        return [at for at, why in self.refused.items() if verdict_of(why) == Verdict.REJECTED]

    @property
    def counts(self) -> dict[Verdict, int]:
        written, refused = self.written, len(self.refused)
        counts = {
            Verdict.INSERTED: len(written.inserted),
            Verdict.SKIPPED: len(written.skipped),
            Verdict.REJECTED: len(self.rejected),
            Verdict.CONFLICT: refused - len(self.rejected),
        }
        if isinstance(written, Merged):
            counts[Verdict.UPDATED] = len(written.updated)
            counts[Verdict.UNCHANGED] = len(written.unchanged)
            counts[Verdict.REVIVED] = len(written.revived)
        return counts

    def used(
        self,
        references: Sequence[Reference],
        columns: Sequence[str],
        update: frozenset[str] | None,
    ) -> dict[Reference, set[Any]]:
        """By reference, the ids that rows wrote into the table."""
        used: dict[Reference, set[Any]] = {}
        for one in references:
            written = set(self.written.inserted)
            if isinstance(self.written, Merged):
                written |= self.written.revived
                if update is None or one.field in update:
                    written |= self.written.updated
            at = columns.index(one.field)
            used[one] = {self.prepared.records[position][at] for position in written}
        return used

    def changes(self, table: str) -> Changes | None:
        """What the audit has to say, row by row, about rows that were there before."""
        if not isinstance(self.written, Merged):
            return None
        counts = {UPDATE: len(self.written.updated), REVIVE: len(self.written.revived)}
        told = {action: count for action, count in counts.items() if count}
        return Changes(table, told) if told else None

    def effect(
        self, part: Part, filtered: int, table: str, entries: Sequence[Entry]
    ) -> ChunkEffect:
        """To be committed with the rows; `entries` are the audit of what they needed beside."""
        counts = self.counts
        counts[Verdict.NOT_REACHED] = len(part.rows) - filtered - sum(counts.values())
        inserted = len(self.written.inserted)
        if inserted:
            entries = [Entry("insert", table, inserted, self.written.keys), *entries]
        return ChunkEffect(
            Receipt(part.number, part.span, filtered, without_zeros(counts)),
            [_row_verdict(part, position, why) for position, why in sorted(self.refused.items())],
            entries,
            self.changes(table),
        )


def _row_verdict(part: Part, position: int, why: Refusal) -> RowVerdict:
    return RowVerdict(
        row_no=part.span.first_row + position,
        chunk_no=part.number,
        line=part.lines[position],
        verdict=verdict_of(why),
        code=why.code,
        column=why.column,
        message=why.message,
        raw=part.raws[position],
    )


def verdict_of(why: Refusal) -> Verdict:
    return Verdict.CONFLICT if why.code in CONFLICTS else Verdict.REJECTED


def without_zeros(counts: Mapping[Verdict, int]) -> dict[str, int]:
    return {name.value: count for name, count in counts.items() if count}
