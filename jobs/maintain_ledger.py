"""Keep the ledger itself from growing for ever: months are dropped, ended jobs removed."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, Final, Literal, TypeVar

import sqlalchemy as sa
from pydantic import Field
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from db.due_rows import DueRows
from db.ledger import chunk, idempotency, parked, rotation, worker
from db.ledger.audit import Entry, Keys
from db.ledger.chunk import Receipt, Span
from db.ledger.limits import BRIEF, limit
from db.ledger.rotation import ROTATED, Rotated
from db.ledger.verdict import Verdict
from db.purge import remove_batch
from db.retry import sqlstate
from db.transaction import transaction
from jobs._declaration import Outcome, Payload, chunked_job
from jobs._pace import Pace
from jobs._run import ChunkedRun, ChunkEffect
from jobs._schedule import Schedule

Kept = Literal["chunk", "verdict", "audit", "spool", "job", "parked"]
LOCK_TIMEOUT_S: Final = 2.0
"""How long all others may have to wait for a partition to be dropped."""

T = TypeVar("T")
_LOCK_TIMEOUT: Final = sa.text(f"SET LOCAL lock_timeout = {round(LOCK_TIMEOUT_S * 1000)}")
_LOCK_NOT_AVAILABLE: Final = "55P03"


class MaintainLedger(Payload):
    """How many days each table is kept, where that is not to be as the settings say."""

    retention_days: dict[Kept, Annotated[int, Field(ge=0, le=36_500)]] = {}
    batch_rows: Annotated[int, Field(ge=1, le=100_000)] = 5_000
    target_s: Annotated[float, Field(gt=0, le=60)] = 0.5


class _Locked(Exception):
    """Others work with the table; the next maintenance tries again."""


NIGHTLY = Schedule(name="ledger_maintenance", cron="45 3 * * *", off_until="ledger_retention_days")


@chunked_job(schedules=[NIGHTLY], timeout_s=12 * 3600, max_age=timedelta(days=1))
async def maintain_ledger(run: ChunkedRun, payload: MaintainLedger) -> Outcome:
    """Make coming partitions; drop what is past its retention. A repetition finds nothing more."""
    last = await run.read(lambda session: chunk.last_receipt(session, run.claim.job_id))
    done = await run.read(lambda session: chunk.tally(session, run.claim.job_id))
    upkeep = _Upkeep(run, payload, 0 if last is None else last.chunk_no, done.rows)
    days = dict(run.housekeeping.ledger_retention_days)
    days.update((name, kept) for name, kept in payload.retention_days.items())
    await _tidy(run, rotation.ensure_partitions)
    outcome: dict[str, Any] = {}
    if "job" in days:
        outcome["job"] = await upkeep.remove_jobs(days["job"])
    for table in ROTATED:
        if table in days:
            outcome[table] = await upkeep.rotate(table, days[table])
    if "parked" in days:
        outcome["parked"] = await upkeep.drain(
            lambda session, most: parked.drop_old(session, days["parked"], most)
        )
    outcome["idempotency"] = await upkeep.drain(idempotency.drop_expired)
    outcome["worker"] = await upkeep.drain(worker.drop_ended)
    return outcome


async def _tidy(run: ChunkedRun, work: Callable[[AsyncSession], Awaitable[T]]) -> T:
    """Do what may be done any number of times; it waits for no lock for long, and holds none."""

    async def unit(session: AsyncSession) -> T:
        await limit(session, BRIEF)
        return await work(session)

    return await transaction(run.sessions, unit, name="job.tidy", receipted=True)


@dataclass
class _Upkeep:
    run: ChunkedRun
    payload: MaintainLedger
    chunk_no: int
    rows: int

    async def remove_jobs(self, days: int) -> int:
        """Remove jobs that have ended, as rows of any other table are purged."""
        due = await self.run.read(lambda session: rotation.ended_jobs(session, days))
        pace = Pace(self.payload.batch_rows, self.payload.target_s)
        behind, removed = None, 0
        while True:
            detail = await self._remove_batch(due, behind, pace.rows)
            removed += int(detail["removed"])
            if detail["examined"] < detail["asked"]:
                return removed
            behind = detail["last"]

    async def _remove_batch(
        self, due: DueRows, behind: list[str] | None, asked: int
    ) -> dict[str, Any]:
        async def work(session: AsyncSession) -> ChunkEffect:
            gone = await remove_batch(session, due, behind, asked)
            detail = {"asked": asked, "examined": gone.examined, "removed": gone.rows}
            return self._effect(
                "purge", "job", gone.rows, gone.keys, {**detail, "last": gone.last or behind}
            )

        return await self._commit(work)

    async def rotate(self, table: Rotated, days: int) -> dict[str, Any]:
        """Drop the months that are past their retention, and rows that are in none."""
        try:
            dropped = (await self._commit(lambda s: self._drop(s, table, days)))["dropped"]
        except _Locked:
            dropped = f"others hold {table}; it is tried again next time"
        strays = 0
        while True:
            detail = await self._commit(lambda s: self._drop_strays(s, table, days))
            strays += detail["removed"]
            if detail["removed"] < self.payload.batch_rows:
                return {"dropped": dropped, "strays": strays}

    async def _drop(self, session: AsyncSession, table: Rotated, days: int) -> ChunkEffect:
        await session.execute(_LOCK_TIMEOUT)
        try:
            names = await rotation.drop_partitions(session, table, days)
        except DBAPIError as error:
            if sqlstate(error) == _LOCK_NOT_AVAILABLE:
                raise _Locked from error
            raise
        effect = self._effect("drop", table, 0, Keys(), {"dropped": names})
        if not names:
            return effect
        entry = Entry(
            "drop", f"bulwark.{table}", len(names), Keys(keys=[(name,) for name in names])
        )
        return ChunkEffect(effect.receipt, [], [entry])

    async def _drop_strays(self, session: AsyncSession, table: Rotated, days: int) -> ChunkEffect:
        most = self.payload.batch_rows
        gone = await rotation.drop_strays(session, table, days, most)
        return self._effect("purge", table, gone, Keys(keys=()), {"removed": gone})

    async def drain(self, batch: Callable[[AsyncSession, int], Awaitable[int]]) -> int:
        """Repeat a batch until there is no full one. Returns how many rows went."""
        most, gone = self.payload.batch_rows, 0
        while True:
            last = await _tidy(self.run, lambda session: batch(session, most))
            gone += last
            if last < most:
                return gone

    def _effect(
        self, action: str, table: str, rows: int, keys: Keys, detail: dict[str, Any]
    ) -> ChunkEffect:
        span = Span(self.rows + 1, rows, 0, 0, 1, 1)
        counts = {Verdict.PURGED.value: rows} if rows else {}
        receipt = Receipt(self.chunk_no + 1, span, counts=counts, detail=detail)
        return ChunkEffect(
            receipt, [], [Entry(action, f"bulwark.{table}", rows, keys)] if rows else ()
        )

    async def _commit(
        self, work: Callable[[AsyncSession], Awaitable[ChunkEffect]]
    ) -> dict[str, Any]:
        span = Span(self.rows + 1, 0, 0, 0, 1, 1)
        receipt = await self.run.commit_chunk(self.chunk_no + 1, span, work)
        self.chunk_no += 1
        self.rows += receipt.span.rows
        return dict(receipt.detail or {})
