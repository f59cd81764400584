"""An insertion that commits everything at its end, or nothing."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog
from sqlalchemy.ext.asyncio import AsyncSession

from db.errors import Race
from db.ledger.chunk import Receipt, Span
from db.ledger.verdict import RowVerdict, Verdict
from db.retry import DATABASE_ERRORS, describe
from jobs._parents import Stale
from jobs._part import Part
from jobs._run import ChunkEffect, TakeReceipt
from jobs._turn import Turn, cancel, one_ahead

if TYPE_CHECKING:
    from jobs._insertion import Insertion

TELL_INTERVAL_S = 1.0
log = structlog.get_logger("bulwark.jobs")


class _Refused(Exception):
    """The rows read so far hold more refused ones than there may be."""

    def __init__(self, last: Part, filtered: int, verdicts: list[RowVerdict]) -> None:
        super().__init__(last.number)
        self.last = last
        self.filtered = filtered
        self.verdicts = verdicts


class Atomic:
    """All chunks of one insertion in one transaction."""

    def __init__(self, insertion: "Insertion") -> None:
        self._insertion = insertion
        self._told_s = time.monotonic()
        self._telling: asyncio.Task[None] | None = None

    async def insert_all(self) -> Receipt | None:
        """Insert everything, or nothing but the verdicts on what stood against it.

        Returns that one receipt, and None when everything is inserted.
        """
        try:
            await self._insertion.run.commit_chunks(self._effects)
        except _Refused as refused:
            return await self._record(refused)
        finally:
            await self._hush()
        return None

    async def _effects(
        self, session: AsyncSession, take: TakeReceipt
    ) -> AsyncGenerator[ChunkEffect, None]:
        insertion = self._insertion
        verdicts: list[RowVerdict] = []
        filtered = 0
        turn = Turn()
        chunks = insertion.prepared(session)
        if not insertion.plan.references:  # otherwise both would use the session at once
            chunks = one_ahead(chunks, insertion.outside)
        async with aclosing(chunks):
            async for ready in chunks:
                part = ready.part
                await take(part.number, part.span)
                try:
                    effect = await insertion.work(session, ready, turn)
                except Stale:
                    raise Race from None
                verdicts += effect.verdicts
                filtered += effect.receipt.filtered
                if insertion.too_many(len(verdicts)):
                    raise _Refused(part, filtered, verdicts)
                yield effect
                self._tell(part.span)
        await self._hush()

    def _tell(self, span: Span) -> None:
        """Now and then tell others how far it is, in a transaction beside this one."""
        now_s = time.monotonic()
        if now_s - self._told_s < TELL_INTERVAL_S or (self._telling and not self._telling.done()):
            return
        self._told_s = now_s
        rows = span.first_row + span.rows - 1
        telling = self._say(rows, span.end_byte)
        self._telling = asyncio.create_task(telling, context=self._insertion.outside.copy())

    async def _hush(self) -> None:
        """What is still to be told is not worth telling."""
        if self._telling is not None:
            await cancel(self._telling)

    async def _say(self, rows: int, end_byte: int) -> None:
        try:
            await self._insertion.run.tell_progress(rows, end_byte)
        except DATABASE_ERRORS as error:
            log.warning("job.progress_untold", reason=describe(error))

    async def _record(self, refused: _Refused) -> Receipt:
        """Commit, as one chunk, what was refused of the rows that were read."""
        start, last = self._insertion.position, refused.last.span
        span = Span(
            start.row,
            last.first_row + last.rows - start.row,
            start.byte,
            last.end_byte,
            start.line,
            last.next_line,
        )
        counts = Counter(str(verdict.verdict) for verdict in refused.verdicts)
        counts[Verdict.NOT_REACHED] = span.rows - refused.filtered - counts.total()
        told = {name: count for name, count in counts.items() if count}
        receipt = Receipt(start.chunk_no, span, refused.filtered, told)
        verdicts = [replace(verdict, chunk_no=start.chunk_no) for verdict in refused.verdicts]

        async def work(_: AsyncSession) -> ChunkEffect:
            return ChunkEffect(receipt, verdicts)

        return await self._insertion.run.commit_chunk(start.chunk_no, span, work)
