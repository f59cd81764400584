"""What a chunked job is given: its claim, and the one way to commit a chunk."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db import steps
from db.errors import Cancelled
from db.ledger import audit, cancellation, chunk, job, progress, verdict
from db.ledger.audit import Changes, Entry
from db.ledger.chunk import Receipt, Span
from db.ledger.job import Claim
from db.ledger.limits import Limits
from db.ledger.verdict import RowVerdict
from db.registry import Registry
from db.steps import Step
from db.transaction import transaction
from jobs._errors import GivenBack
from jobs._housekeeping import Housekeeping
from jobs._sources.place import ImportPlace
from jobs._turn import Turn

CHUNK_LIMITS = Limits(statement_s=600.0, idle_s=600.0)
T = TypeVar("T")
TakeReceipt = Callable[[int, Span], Awaitable[None]]
log = structlog.get_logger("bulwark.jobs")


@dataclass(frozen=True)
class ChunkEffect:
    """What the work of a chunk hands back, to be committed with it."""

    receipt: Receipt
    verdicts: list[RowVerdict] = field(default_factory=list)
    entries: Sequence[Entry] = ()
    changes: Sequence[Changes] = ()


@dataclass(frozen=True)
class ChunkedRun:
    """One run of a chunked job under one claim.

    Once `stopping` is set it begins no transaction, be it of one chunk or of all.
    """

    claim: Claim
    sessions: async_sessionmaker[AsyncSession]
    models: Registry
    import_folders: Sequence[ImportPlace]
    housekeeping: Housekeeping = field(default_factory=Housekeeping)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self, work: Callable[[AsyncSession], Awaitable[T]]) -> T:
        """Run statements that change nothing, in a transaction of their own."""
        return await transaction(self.sessions, work, name="job.read", receipted=True)

    async def report(self) -> dict[str, Any]:
        """What has become of the rows so far, for the outcome of the job."""
        return await self.read(lambda session: chunk.report(session, self.claim.job_id))

    async def commit_chunk(
        self,
        chunk_no: int,
        span: Span,
        work: Callable[[AsyncSession], Awaitable[ChunkEffect]],
        turn: Turn | None = None,
    ) -> Receipt:
        """Commit fence, receipt, effect, verdicts and audit together; then say so in the log.

        The work may run several times, each time in a new transaction. A chunk that was committed
        before is not done again: its receipt is returned. With a turn it commits after the chunk
        before, and the work has to ask it before it writes. Raises ClaimLost, Cancelled, GivenBack.
        """
        self._heed_stop()
        turn = turn or Turn()

        async def unit(session: AsyncSession) -> ChunkEffect | Receipt:
            await turn.begin()
            await self._fence(session, (chunk_no, span))
            await chunk.take_receipt(session, self.claim, chunk_no, span)
            steps.reached(Step.RECEIPTED)
            effect = await work(session)
            steps.reached(Step.APPLIED)
            turn.rows_are_in()
            await self._record(session, effect)
            await turn.may_look()
            steps.reached(Step.COMMITTING)
            return effect

        done = await transaction(self.sessions, unit, name="job.chunk", receipted=True)
        steps.reached(Step.COMMITTED)
        if isinstance(done, Receipt):
            return done
        self._tell(done)
        return done.receipt

    async def commit_chunks(
        self, effects: Callable[[AsyncSession, TakeReceipt], AsyncGenerator[ChunkEffect, None]]
    ) -> list[Receipt]:
        """Commit all chunks of the job together; then say so in the log.

        The effects may be asked for several times, each time in a new transaction; they take each
        chunk's receipt before they do its work. Returns no receipts where all were committed
        before. Raises ClaimLost, GivenBack, and Cancelled behind any chunk.
        """
        self._heed_stop()
        first: tuple[int, Span] | None = None

        async def unit(session: AsyncSession) -> list[ChunkEffect]:
            await self._fence(session, first)

            async def take(chunk_no: int, span: Span) -> None:
                nonlocal first
                first = first or (chunk_no, span)
                await chunk.take_receipt(session, self.claim, chunk_no, span)
                steps.reached(Step.RECEIPTED)

            done = []
            async with aclosing(effects(session, take)) as all_effects:
                async for effect in all_effects:
                    steps.reached(Step.APPLIED)
                    await self._record(session, effect)
                    await cancellation.heed(session, self.claim)
                    done.append(effect)
            await progress.forget(session, self.claim)
            steps.reached(Step.COMMITTING)
            return done

        done = await transaction(self.sessions, unit, name="job.chunks", receipted=True)
        steps.reached(Step.COMMITTED)
        if isinstance(done, Receipt):
            return []
        for effect in done:
            self._tell(effect)
        return [effect.receipt for effect in done]

    async def tell_progress(self, rows: int, read_bytes: int) -> None:
        """Let others see how far a job is that has committed nothing yet."""
        await transaction(
            self.sessions,
            lambda session: progress.tell(session, self.claim, rows, read_bytes),
            name="job.progress",
            receipted=True,
        )

    async def tell_pause(self, reason: str) -> None:
        """Let others see what the job waits for. Raises Cancelled and GivenBack."""
        self._heed_stop()

        async def tell(session: AsyncSession) -> None:
            await cancellation.heed(session, self.claim)
            await progress.tell_pause(session, self.claim, reason)

        await transaction(self.sessions, tell, name="job.pause", receipted=True)

    async def forget_pause(self) -> None:
        """Take back that the job waits."""
        await transaction(
            self.sessions,
            lambda session: progress.forget(session, self.claim),
            name="job.pause",
            receipted=True,
        )

    def _heed_stop(self) -> None:
        if self.stopping.is_set():
            raise GivenBack

    async def _fence(self, session: AsyncSession, tried: tuple[int, Span] | None) -> None:
        """Fence; where an earlier try has committed what was tried, that wins over a cancellation.

        Its answer may have been lost, and the job cancelled before it was asked for again.
        """
        try:
            await job.fence(session, self.claim, CHUNK_LIMITS)
        except Cancelled:
            if tried is not None:
                await chunk.take_receipt(session, self.claim, *tried)
            raise
        steps.reached(Step.FENCED)

    async def _record(self, session: AsyncSession, effect: ChunkEffect) -> None:
        number = effect.receipt.chunk_no
        await verdict.write_verdicts(session, self.claim.job_id, effect.verdicts)
        await audit.write_entries(session, self.claim, number, effect.entries)
        await chunk.fill_receipt(session, self.claim, effect.receipt)

    def _tell(self, effect: ChunkEffect) -> None:
        receipt = effect.receipt
        log.info(
            "chunk.committed",
            job=str(self.claim.job_id),
            claim=str(self.claim.claim_id),
            kind=self.claim.kind,
            chunk=receipt.chunk_no,
            rows=receipt.span.rows,
            **receipt.counts,
        )
        for entry in effect.entries:
            summary = entry.keys.as_summary()
            self._tell_audit(receipt, entry.action, entry.table_name, entry.rows, summary)
        for changes in effect.changes:
            for action, rows in changes.counts.items():
                self._tell_audit(receipt, action, changes.table_name, rows, {"count": rows})

    def _tell_audit(
        self, receipt: Receipt, action: str, table: str, rows: int, keys: Mapping[str, Any]
    ) -> None:
        log.info(
            "audit.written",
            job=str(self.claim.job_id),
            claim=str(self.claim.claim_id),
            chunk=receipt.chunk_no,
            actor=self.claim.actor,
            action=action,
            table=table,
            rows=rows,
            keys=keys,
        )
