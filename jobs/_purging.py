"""One purge from its beginning to its end: passes over tables, batch by batch, with receipts."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncSession

from db.due_rows import DueRows, bytes_a_row, goes_round, read_cutoffs
from db.ledger import chunk
from db.ledger.audit import Entry
from db.ledger.chunk import OPENING, Receipt, Span
from db.ledger.verdict import RowVerdict, Verdict
from db.purge import Kept, Removed, explain_kept, remove_batch
from jobs._archive import Archive, as_detail
from jobs._pace import Pace
from jobs._pauses import Pauses
from jobs._run import ChunkedRun, ChunkEffect

_ARCHIVED_BYTES: Final = 16 * 1024 * 1024
"""About how much of a table is archived at once: a batch is in memory."""


class _CapReached(Exception):
    """So many rows are gone as may go."""


@dataclass(frozen=True)
class Step:
    """Passes over the tables of a group: to remove what can go, or to judge what is left, too."""

    group: Sequence[DueRows]
    judges: bool

    @property
    def repeats(self) -> bool:
        return not self.judges and goes_round(self.group)


def steps(groups: Sequence[Sequence[DueRows]]) -> list[Step]:
    """The whole way: every table once, circles until nothing goes; then once more to judge.

    What was locked the first time is tried again when it is judged.
    """
    every = [due for group in groups for due in group]
    return [*(Step(group, False) for group in groups), *(Step([due], True) for due in every)]


@dataclass
class Purging:
    """One run of a purge, with what is left of its cap."""

    run: ChunkedRun
    steps: Sequence[Step]
    pauses: Pauses
    pace: Pace
    archive: Archive | None
    left: int | None
    chunk_no: int = 0
    rows: int = 0
    _most_rows: dict[int, int] = field(default_factory=dict)

    async def go_on(self) -> bool:
        """Do what receipts do not tell as done. Returns whether the cap was reached."""
        done = await self.run.read(lambda session: chunk.tally(session, self.run.claim.job_id))
        last = await self.run.read(
            lambda session: chunk.last_receipt(session, self.run.claim.job_id)
        )
        self.rows = done.rows
        self.chunk_no = 0 if last is None else last.chunk_no
        if self.left is not None:
            self.left -= done.counts.get(Verdict.PURGED, 0)
        try:
            await self._take_steps((last and last.detail) or {})
        except _CapReached:
            return True
        return False

    async def _take_steps(self, last: Mapping[str, Any]) -> None:
        if self.left == 0:
            raise _CapReached
        first, behind = self._resumed(last)
        for step in self.steps[first:]:
            gone = await self._rounds(step, behind)
            while gone and step.repeats:
                gone = await self._rounds(step, None)
            behind = None

    def _resumed(self, last: Mapping[str, Any]) -> tuple[int, list[str] | None]:
        """The step to go on with, and the place in it, by the detail of the last receipt."""
        at = next((at for at, step in enumerate(self.steps) if _was_in(step, last)), None)
        if at is None or self.steps[at].repeats:
            return at or 0, None
        if last["examined"] < last["asked"]:
            return at + 1, None
        return at, last["last"]

    async def _rounds(self, step: Step, behind: list[str] | None) -> int:
        return sum([await self._pass(due, behind, judges=step.judges) for due in step.group])

    async def _pass(self, due: DueRows, behind: list[str] | None, *, judges: bool) -> int:
        """Go once through the rows that are due. Returns how many were removed."""
        gone = 0
        while True:
            await self.pauses.wait(due)
            did = (await self._commit(due, behind, judges=judges)).detail or {}
            removed: int = did["removed"]
            gone += removed
            if self.left is not None:
                self.left -= removed
            if self.left == 0:
                raise _CapReached
            if did["examined"] < did["asked"]:
                return gone
            behind = did["last"]

    async def _commit(self, due: DueRows, behind: list[str] | None, *, judges: bool) -> Receipt:
        asked = await self._batch_rows(due)
        number = self.chunk_no + 1
        span = Span(self.rows + 1, 0, 0, 0, 1, 1)
        columns = _all_columns(due) if self.archive else ()

        async def work(session: AsyncSession) -> ChunkEffect:
            removed = await remove_batch(session, due, behind, asked, columns)
            kept = []
            if judges and removed.last is not None:
                kept = await explain_kept(session, due, behind, removed.last)
            detail = {"table": due.table_name, "judges": judges, "asked": asked}
            detail["last"] = removed.last
            return await self._effect(due, number, removed, kept, detail)

        start_s = time.monotonic()
        receipt = await self.run.commit_chunk(number, span, work)
        self.pace.took(asked, time.monotonic() - start_s)
        self.chunk_no = number
        self.rows += receipt.span.rows
        return receipt

    async def _effect(
        self,
        due: DueRows,
        number: int,
        removed: Removed,
        kept: Sequence[Kept],
        detail: dict[str, Any],
    ) -> ChunkEffect:
        detail |= {"examined": removed.examined, "removed": removed.rows}
        if self.archive and removed.rows:
            piece = await self.archive.store(number, due.facts, removed.texts, removed.rows)
            detail["piece"] = as_detail(piece)
        first = self.rows + 1
        counts = {Verdict.PURGED.value: removed.rows, Verdict.KEPT.value: len(kept)}
        verdicts = [
            _verdict(due, first + removed.rows + at, number, one) for at, one in enumerate(kept)
        ]
        entry = Entry("purge", due.table_name, removed.rows, removed.keys)
        return ChunkEffect(
            Receipt(
                number,
                Span(first, removed.rows + len(kept), 0, 0, 1, 1),
                counts={name: count for name, count in counts.items() if count},
                detail=detail,
            ),
            verdicts,
            [entry] if removed.rows else (),
        )

    async def _batch_rows(self, due: DueRows) -> int:
        rows = self.pace.rows if self.left is None else min(self.pace.rows, self.left)
        if self.archive is None:
            return rows
        if due.oid not in self._most_rows:
            size = await self.run.read(lambda session: bytes_a_row(session, due))
            self._most_rows[due.oid] = max(1, int(_ARCHIVED_BYTES / size))
        return min(rows, self._most_rows[due.oid])


def _was_in(step: Step, last: Mapping[str, Any]) -> bool:
    """Whether this is the step of the last receipt."""
    names = [due.table_name for due in step.group]
    return last.get("judges") is step.judges and last.get("table") in names


def _all_columns(due: DueRows) -> list[str]:
    """Those that the database computes, too."""
    facts = due.facts
    return [*(one.name for one in facts.columns), *(one.name for one in facts.generated)]


def _verdict(due: DueRows, row_no: int, chunk_no: int, kept: Kept) -> RowVerdict:
    row = f"{due.table_name} {kept.key}"
    if kept.referrer is None:
        code, message = "locked", f"{row} was locked by another transaction"
    else:
        by = f" of {kept.by}" if kept.by else ""
        code, message = "still_referenced", f"{row} is still referred to by {kept.referrer}{by}"
    return RowVerdict(row_no, chunk_no, None, Verdict.KEPT, code, None, message, None)


async def open_purge(run: ChunkedRun, retention: Mapping[str, int]) -> dict[str, Any]:
    """Fix, at the first run, what is due: the cutoff of each table, and when the purge began."""
    span = Span(1, 0, 0, 0, 1, 1)

    async def work(session: AsyncSession) -> ChunkEffect:
        began = await read_cutoffs(session, {"began": 0})
        detail = {"cutoffs": await read_cutoffs(session, retention), **began}
        return ChunkEffect(Receipt(OPENING, span, detail=detail))

    opening = await run.commit_chunk(OPENING, span, work)
    return dict(opening.detail or {})
