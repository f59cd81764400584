"""The rescue: it takes back what a dead worker held, and keeps the ledger tidy."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar
from uuid import UUID

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.ledger import cancellation, idempotency, schedule, spool, take_back, worker
from db.ledger.job import State
from db.ledger.limits import BRIEF, limit
from db.ledger.take_back import TakenBack
from db.ledger.worker import LostWorker
from db.retry import DATABASE_ERRORS, describe, sqlstate
from db.transaction import brief, look
from worker.outage import Outage

INTERVAL_S = 1.5
GAP_PART = 3
"""A rescuer that hears nothing for this part of the time after which a worker is lost was away."""
LOCK_TIMEOUT_S = BRIEF.lock_s
TERMINATE_TRIES = 100
TERMINATE_WAIT_S = 0.05
TIDY_INTERVAL_S = 60.0
TIDY_BATCH = 100
_LOCK_NOT_AVAILABLE = "55P03"
T = TypeVar("T")
Work = Callable[[AsyncSession], Awaitable[T]]
log = structlog.get_logger("bulwark.rescue")


class Locked(Exception):
    """Another transaction holds what this one needs; the next round tries again."""


class Away(Exception):
    """The rescuer heard nothing from PostgreSQL for a while, and so may know nothing of others."""


class Rescue:
    """One worker's rescue; any number may run, since each step locks what it changes.

    After an outage nobody is declared lost for `lost_after_s`, so that the living can beat first.
    `on_loss` is called when a worker was: it may have heard rings of jobs that it never claimed.
    """

    def __init__(
        self,
        worker_id: UUID,
        sessions: async_sessionmaker[AsyncSession],
        lost_after_s: float,
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        self._worker_id = worker_id
        self._sessions = sessions
        self._lost_after = timedelta(seconds=lost_after_s)
        self._on_loss = on_loss
        self._gap_s = max(2 * INTERVAL_S, lost_after_s / GAP_PART)
        self._heard_s = now_s()
        self._quiet_until_s = 0.0
        self._outage = Outage(log, "rescue.failed", "rescue.back")
        self._untidy: dict[str, Outage] = {}

    async def run_forever(self) -> None:
        """Look after the others, and beside it keep the ledger tidy, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._look_forever(), name="rescue.look")
            tasks.create_task(self._tidy_forever(), name="rescue.tidy")

    async def look_round(self) -> None:
        """One round: declare the silent lost, rescue from the lost, take back what was forgotten.

        What fails for one worker is told, and does not keep the others waiting. A look comes
        first, since mostly there is nothing to do.
        """
        amiss = await look(
            self._sessions, lambda s: take_back.is_anything_amiss(s, self._lost_after)
        )
        self._hear()
        if not amiss:
            return
        if not await self._is_too_early():
            await self._declare_lost()
        for worker_id in await self._do(worker.unfinished_losses):
            with _told(worker_id):
                await self._rescue(worker_id)
        self._tell(await self._do(take_back.forgotten))

    async def tidy(self) -> None:
        """Make the coming partitions, make due what is cancelled, drop what nobody needs any more.

        A worker that puts a job off, and who cancels it at that moment, do not see each other.
        """
        await self._tidy("partitions", _ensure_partitions)
        await self._tidy("idempotency", lambda s: idempotency.drop_expired(s, TIDY_BATCH))
        await self._tidy("spool", lambda s: spool.drop_finished(s, TIDY_BATCH))
        await self._tidy("worker", lambda s: worker.drop_ended(s, TIDY_BATCH))
        await self._tidy("cancelled", lambda s: cancellation.make_due(s, TIDY_BATCH))
        await self._tidy("cancellation", lambda s: cancellation.drop_obsolete(s, TIDY_BATCH))
        await self._tidy("slot", lambda s: schedule.drop_old(s, TIDY_BATCH))

    async def _look_forever(self) -> None:
        while True:
            try:
                await self.look_round()
            except (Locked, *DATABASE_ERRORS) as error:
                wait_s = self._outage.fail(describe(error))
                await asyncio.sleep(wait_s)  # nothing tells that PostgreSQL is back
            else:
                self._outage.end()
                await asyncio.sleep(INTERVAL_S)  # a silent worker gives no sign to wait for

    async def _tidy_forever(self) -> None:
        while True:
            if not self._outage.lasts:
                await self.tidy()
            await asyncio.sleep(TIDY_INTERVAL_S)  # nobody waits for what is tidied away

    async def _do(self, work: Work[T]) -> T:
        """Do the work in a transaction, and notice when PostgreSQL was long in answering."""
        try:
            result = await brief(
                self._sessions,
                _bounded(work),
                name="rescue",
            )
        except Locked:
            self._heard_s += LOCK_TIMEOUT_S  # PostgreSQL was there, and let it wait
            raise
        self._hear()
        return result

    def _hear(self) -> None:
        self._notice_gap()
        self._heard_s = now_s()

    def _notice_gap(self) -> None:
        if now_s() - self._heard_s > self._gap_s:
            self._quiet_until_s = now_s() + self._lost_after.total_seconds()

    def _is_quiet(self) -> bool:
        self._notice_gap()
        return now_s() < self._quiet_until_s

    def _require_hearing(self) -> None:
        if self._is_quiet():
            raise Away("nothing was heard from PostgreSQL for a while; the living beat first")

    async def _is_too_early(self) -> bool:
        age_s = await self._do(worker.server_age_s)
        return self._is_quiet() or age_s < self._lost_after.total_seconds()

    async def _declare_lost(self) -> None:
        for lost in await self._do(lambda s: worker.silent_workers(s, self._lost_after)):
            if self._is_quiet():
                return
            if lost.id != self._worker_id:
                with _told(lost.id):
                    await self._mark_lost(lost)

    async def _mark_lost(self, lost: LostWorker) -> None:
        async def mark(session: AsyncSession) -> bool:
            marked = await worker.mark_lost(session, lost.id, self._lost_after)
            self._require_hearing()
            return marked

        try:
            marked = await self._do(mark)
        except Locked:  # mostly by a claim of its own that stands still
            self._require_hearing()
            await self._terminate(lost.id)
            marked = await self._do(mark)
        if marked:
            log.warning("worker.declared_lost", worker=str(lost.id), host=lost.host, pid=lost.pid)
            self._on_loss()

    async def _rescue(self, worker_id: UUID) -> None:
        """Free the locks of the lost worker first, then put its jobs back into their queues."""
        for _ in range(TERMINATE_TRIES):
            if await self._terminate(worker_id) == 0:
                break
            await asyncio.sleep(TERMINATE_WAIT_S)  # a backend ends a moment after it was told to
        self._tell(await self._do(lambda s: take_back.from_worker(s, worker_id)))

    async def _terminate(self, worker_id: UUID) -> int:
        return await self._do(lambda s: worker.terminate_backends(s, worker_id, self._lost_after))

    @staticmethod
    def _tell(taken: list[TakenBack]) -> None:
        for one in taken:
            log.warning(
                "job.poisoned" if one.state == State.FAILED else "job.rescued",
                job=str(one.job_id),
                claim=str(one.claim_id),
                kind=one.kind,
                crashes=one.crashes,
            )

    async def _tidy(self, what: str, batch: Work[int]) -> None:
        """Do one kind of tidying, in batches of TIDY_BATCH until there is no full one."""
        outage = self._untidy.setdefault(
            what, Outage(log, "rescue.not_tidied", "rescue.tidied", what=what)
        )
        try:
            while (
                await brief(
                    self._sessions,
                    _bounded(batch),
                    name="tidy",
                )
                == TIDY_BATCH
            ):
                pass
        except (Locked, *DATABASE_ERRORS) as error:
            outage.fail(describe(error))
        else:
            outage.end()


def now_s() -> float:
    """Seconds on a clock that goes on while the machine is suspended, where there is one."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def _bounded(work: Work[T]) -> Work[T]:
    """The same work, which waits for no lock longer than LOCK_TIMEOUT_S: Locked, no replay.

    Nor does it hold what others wait for, should this process stand still.
    """

    async def bounded(session: AsyncSession) -> T:
        await limit(session, BRIEF)
        try:
            return await work(session)
        except DBAPIError as error:
            if sqlstate(error) == _LOCK_NOT_AVAILABLE:
                raise Locked(f"a lock was not to be had within {LOCK_TIMEOUT_S:g} s") from error
            raise

    return bounded


@contextmanager
def _told(worker_id: UUID) -> Iterator[None]:
    try:
        yield
    except (Away, Locked, *DATABASE_ERRORS) as error:
        log.warning("worker.not_rescued", worker=str(worker_id), reason=describe(error))


async def _ensure_partitions(session: AsyncSession) -> int:
    await session.execute(sa.text("SELECT bulwark.ensure_partitions()"))
    return 0
