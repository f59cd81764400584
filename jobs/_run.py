"""What a chunked job is given: its claim, and the one way to commit a chunk."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import structlog
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.ledger import audit, chunk, job, verdict
from db.ledger.audit import Entry
from db.ledger.chunk import Receipt, Span
from db.ledger.job import Claim, Limits
from db.ledger.verdict import RowVerdict
from db.registry import Registry
from db.transaction import transaction

CHUNK_LIMITS = Limits(statement_s=600.0, idle_s=600.0)
T = TypeVar("T")
log = structlog.get_logger("bulwark.jobs")


@dataclass(frozen=True)
class ChunkEffect:
    """What the work of a chunk hands back, to be committed with it."""

    receipt: Receipt
    verdicts: list[RowVerdict] = field(default_factory=list)
    entry: Entry | None = None


@dataclass(frozen=True)
class ChunkedRun:
    """One run of a chunked job under one claim."""

    claim: Claim
    sessions: async_sessionmaker[AsyncSession]
    models: Registry
    import_folders: Sequence[Path]

    async def read(self, work: Callable[[AsyncSession], Awaitable[T]]) -> T:
        """Run statements that change nothing, in a transaction of their own."""
        return await transaction(self.sessions, work, name="job.read", receipted=True)

    async def commit_chunk(
        self,
        chunk_no: int,
        span: Span,
        work: Callable[[AsyncSession], Awaitable[ChunkEffect]],
    ) -> Receipt:
        """Commit fence, receipt, effect, verdicts and audit together; then say so in the log.

        The work may run several times, each time in a new transaction. A chunk that was committed
        before is not done again: its receipt is returned. Raises ClaimLost.
        """

        async def unit(session: AsyncSession) -> ChunkEffect | Receipt:
            await job.fence(session, self.claim, CHUNK_LIMITS)
            await chunk.take_receipt(session, self.claim, chunk_no, span)
            effect = await work(session)
            await self._record(session, effect)
            return effect

        done = await transaction(self.sessions, unit, name="job.chunk", receipted=True)
        if isinstance(done, Receipt):
            return done
        self._tell(done)
        return done.receipt

    async def _record(self, session: AsyncSession, effect: ChunkEffect) -> None:
        number = effect.receipt.chunk_no
        await verdict.write_verdicts(session, self.claim.job_id, effect.verdicts)
        if effect.entry is not None:
            await audit.write_entry(session, self.claim, number, effect.entry)
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
        if effect.entry is not None:
            log.info(
                "audit.written",
                job=str(self.claim.job_id),
                claim=str(self.claim.claim_id),
                chunk=receipt.chunk_no,
                actor=self.claim.actor,
                action=effect.entry.action,
                table=effect.entry.table_name,
                rows=effect.entry.rows,
                keys=effect.entry.keys.as_summary(),
            )
