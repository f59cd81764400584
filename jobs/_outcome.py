"""What became of the rows of a chunk: verdicts, counts, and what the audit has to say."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from db.ledger.audit import Changes, Entry
from db.ledger.chunk import ALONG, Receipt
from db.ledger.verdict import RowVerdict, Verdict
from db.outcome import Written, verdict_of
from db.refusal import Refusal
from jobs._part import Part
from jobs._prepared import Prepared
from jobs._references import Reference
from jobs._run import ChunkEffect


@dataclass
class Outcome:
    """What became of the rows of a chunk, by their position."""

    prepared: Prepared
    written: Written

    @property
    def refused(self) -> dict[int, Refusal]:
        from_table = {
            self.prepared.positions[index]: self.prepared.masked(index, why)
            for index, why in self.written.refused.items()
        }
        return self.prepared.refused | from_table

    @property
    def rejected(self) -> list[int]:
        return [at for at, why in self.refused.items() if verdict_of(why) == Verdict.REJECTED]

    @property
    def counts(self) -> Counter[Verdict]:
        counts = Counter({verdict: len(rows) for verdict, rows in self.written.taken().items()})
        counts.update(verdict_of(why) for why in self.refused.values())
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
            written = self.written.wrote(one.field, update)
            at = columns.index(one.field)
            used[one] = {self.prepared.records[position][at] for position in written}
        return used

    @property
    def _detail(self) -> Mapping[str, Any] | None:
        along = {table: sum(by.values()) for table, by in self.written.changed_along.items()}
        return {ALONG: along} if along else None

    def effect(
        self, part: Part, filtered: int, table: str, entries: Sequence[Entry]
    ) -> ChunkEffect:
        """To be committed with the rows; `entries` are the audit of what they needed beside."""
        counts = self.counts
        counts[Verdict.NOT_REACHED] = len(part.rows) - filtered - counts.total()
        keys = self.written.inserted_keys
        if keys is not None and (inserted := counts[Verdict.INSERTED]):
            entries = [Entry("insert", table, inserted, keys), *entries]
        changes = {table: self.written.changed, **self.written.changed_along}
        return ChunkEffect(
            Receipt(part.number, part.span, filtered, without_zeros(counts), self._detail),
            [_row_verdict(part, position, why) for position, why in sorted(self.refused.items())],
            entries,
            [Changes(name, counts) for name, counts in changes.items() if counts],
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


def without_zeros(counts: Mapping[Verdict, int]) -> dict[str, int]:
    return {name.value: count for name, count in counts.items() if count}
