"""A bulk write that commits everything at its end, or nothing, or only tries."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import structlog
from sqlalchemy.ext.asyncio import AsyncSession

from db.errors import Race
from db.ledger.chunk import ALONG, Receipt, Span
from db.ledger.verdict import RowVerdict, Verdict
from db.retry import DATABASE_ERRORS, describe
from jobs._parents import Stale
from jobs._part import Part
from jobs._run import ChunkEffect, TakeReceipt
from jobs._turn import Turn, cancel, one_ahead

if TYPE_CHECKING:
    from jobs._bulk_write import BulkWrite

TELL_INTERVAL_S = 1.0
log = structlog.get_logger("bulwark.jobs")


class _Undone(Exception):
    """The rows read so far are not to be kept: too many were refused, or it was a trial."""

    def __init__(self, last: Part, read: "_Read", counts: Counter[str]) -> None:
        super().__init__(last.number)
        self.last = last
        self.read = read
        self.counts = counts


@dataclass
class _Read:
    """What became of the rows read so far, or would have."""

    filtered: int = 0
    verdicts: list[RowVerdict] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    along: Counter[str] = field(default_factory=Counter)

    def add(self, effect: ChunkEffect) -> None:
        receipt = effect.receipt
        self.filtered += receipt.filtered
        self.verdicts += effect.verdicts
        self.counts.update(receipt.counts)
        self.along.update((receipt.detail or {}).get(ALONG, {}))

    @property
    def refused(self) -> Counter[str]:
        return Counter(str(verdict.verdict) for verdict in self.verdicts)


class Together:
    """All chunks of one bulk write in one transaction."""

    def __init__(self, writing: "BulkWrite") -> None:
        self._writing = writing
        self._told_s = time.monotonic()
        self._telling: asyncio.Task[None] | None = None

    async def write_all(self) -> Receipt | None:
        """Write everything, or nothing but the verdicts.

        Returns that one receipt, and None when everything is written.
        """
        try:
            await self._writing.run.commit_chunks(self._effects)
        except _Undone as undone:
            return await self._record(undone)
        finally:
            await self._hush()
        return None

    async def _effects(
        self, session: AsyncSession, take: TakeReceipt
    ) -> AsyncGenerator[ChunkEffect, None]:
        writing = self._writing
        read = _Read()
        part = None
        turn = Turn()
        chunks = writing.prepared(session)
        if not writing.plan.references:  # otherwise both would use the session at once
            chunks = one_ahead(chunks, writing.outside)
        async with aclosing(chunks):
            async for ready in chunks:
                part = ready.part
                await take(part.number, part.span)
                try:
                    effect = await writing.work(session, ready, turn)
                except Stale:
                    raise Race(
                        f"the rows that chunk {part.number} refers to changed while it was "
                        "written; run the job when they are at rest"
                    ) from None
                read.add(effect)
                if writing.too_many(writing.rules.rejects(read.counts)):
                    raise _Undone(part, read, read.refused)
                yield effect
                self._tell(part.span)
        await self._hush()
        if writing.rules.dry_run and part is not None:
            raise _Undone(part, read, read.counts)

    def _tell(self, span: Span) -> None:
        """Now and then tell others how far it is, in a transaction beside this one."""
        now_s = time.monotonic()
        if now_s - self._told_s < TELL_INTERVAL_S or (self._telling and not self._telling.done()):
            return
        self._told_s = now_s
        rows = span.first_row + span.rows - 1
        telling = self._say(rows, span.end_byte)
        self._telling = asyncio.create_task(telling, context=self._writing.outside.copy())

    async def _hush(self) -> None:
        """What is still to be told is not worth telling."""
        if self._telling is not None:
            await cancel(self._telling)

    async def _say(self, rows: int, end_byte: int) -> None:
        try:
            await self._writing.run.tell_progress(rows, end_byte)
        except DATABASE_ERRORS as error:
            log.warning("job.progress_untold", reason=describe(error))

    async def _record(self, undone: _Undone) -> Receipt:
        """Commit, as one chunk, what became, or would, of the rows that were read."""
        start, last = self._writing.position, undone.last.span
        span = Span(
            start.row,
            last.first_row + last.rows - start.row,
            start.byte,
            last.end_byte,
            start.line,
            last.next_line,
        )
        counts = undone.counts
        counts[Verdict.NOT_REACHED] = span.rows - undone.read.filtered - counts.total()
        told = {name: count for name, count in counts.items() if count}
        along = undone.read.along if self._writing.rules.dry_run else None
        detail = {ALONG: dict(along)} if along else None
        receipt = Receipt(start.chunk_no, span, undone.read.filtered, told, detail)
        verdicts = [replace(verdict, chunk_no=start.chunk_no) for verdict in undone.read.verdicts]

        async def work(_: AsyncSession) -> ChunkEffect:
            return ChunkEffect(receipt, verdicts)

        return await self._writing.run.commit_chunk(start.chunk_no, span, work)
