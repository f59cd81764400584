"""The relay: it rings queued jobs whose ring is due, was lost, or never went out."""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from uuid import UUID

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.ledger import ring
from db.ledger.job import Ring
from db.retry import DATABASE_ERRORS, describe
from db.transaction import brief, look
from jobs._bell import Bell, job_id_of
from worker.mark import Mark, mark_key
from worker.outage import Outage
from worker.redis_pool import may_evict

BATCH = 1000
PAGE = 10_000
"""How many jobs one transaction makes due for a ring, where all are to be rung again."""
SWEEP_INTERVAL_S = 30.0
LEAST_WAIT_S = 0.01
_FIRST = UUID(int=0)
_KEEP = "set its maxmemory-policy to noeviction"
log = structlog.get_logger("bulwark.relay")


@dataclass
class _Debt:
    """All queued jobs up to `last` are to be rung again; so many, up to `after`, are due by now."""

    last: UUID | None = None
    after: UUID = _FIRST
    jobs: int = 0


class Relay:
    """One worker's relay; any number may run, since each locks the rows that it rings.

    A mark in Redis, of its present run, tells all relays whether it still is what it was: where
    there is none, Redis was wiped, restarted or replaced, or rings were lost, and one of them has
    every queued job rung again. The
    jobs of `unclaimed`, whose rings were heard in vain, are rung again as soon as PostgreSQL
    answers. Rings that Redis did not take are kept, and are rung before any other.
    """

    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        redis: Redis,
        queues: tuple[str, ...],
        interval_s: float,
        unclaimed: set[UUID],
    ) -> None:
        self._sessions = sessions
        self._redis = redis
        self._bell = Bell(redis)
        self._queues = queues
        self._interval_s = interval_s
        self._unclaimed = unclaimed
        self._mark = Mark(redis)
        self._debt: _Debt | None = None
        self._woken = asyncio.Event()
        self._unrung: list[Ring] = []
        self._swept_s = time.monotonic()
        self._redis_outage = Outage(log, "relay.failed", "relay.back", server="redis")
        self._queue_outages: dict[str, Outage] = {}
        self._postgres_outage = Outage(log, "relay.failed", "relay.back", server="postgresql")
        self._evicting = Outage(log, "redis.evicts", "redis.lasting")

    async def run_forever(self) -> None:
        """Ring until cancelled; while PostgreSQL or Redis is away, say so and try again."""
        while True:
            try:
                await self._notice_new_redis()
                await self._ring_unrung()
                wait_s = await self._ring_until_none_is_due()
                await self._sweep_now_and_then()
            except RedisError as error:
                wait_s = self._redis_outage.fail(str(error))
                await asyncio.sleep(wait_s)  # nothing tells that Redis is back
            except DATABASE_ERRORS as error:
                wait_s = self._postgres_outage.fail(describe(error))
                await asyncio.sleep(wait_s)  # nothing tells that PostgreSQL is back
            else:
                self._redis_outage.end()
                self._postgres_outage.end()
                await self._rest(wait_s)

    def wake(self) -> None:
        """Have it look soon, since a job may be due that no producer rings."""
        self._woken.set()

    async def _rest(self, wait_s: float) -> None:
        """Wait so long, or until woken; for a moment even if it was woken since its last look."""
        if self._woken.is_set():
            await asyncio.sleep(LEAST_WAIT_S)  # the pause that many who enqueue have in common
        else:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._woken.wait()
        self._woken.clear()

    async def hand_over(self, by_s: float) -> None:
        """Leave to the other relays, or to one that comes later, what this one has not rung.

        Where PostgreSQL cannot be told by then, on the loop's clock, the mark goes, so that the
        next relay rings all again; without Redis a mark of this relay's own ends by itself.
        """
        self._unclaimed |= {one.job_id for one in self._unrung}
        if not self._unclaimed and self._debt is None:
            return
        try:
            async with asyncio.timeout_at(by_s):
                await self._seconds_to_next_ring()
                while await self._make_lost_rings_due():
                    pass
        except (RedisError, *DATABASE_ERRORS):
            with suppress(RedisError, OSError):
                await self._redis.delete(await mark_key(self._redis))

    async def ring_due(self) -> list[Ring]:
        """Ring one batch of what is due, and what Redis did not take before."""
        rings = await brief(
            self._sessions,
            lambda session: ring.due_rings(session, BATCH),
            name="relay.ring",
        )
        self._unrung += rings
        await self._ring_unrung()
        return rings

    async def _ring_unrung(self) -> None:
        """Ring queue by queue: one whose key is of a wrong type is left for later."""
        for queue in sorted({one.queue for one in self._unrung}):
            rings = [one for one in self._unrung if one.queue == queue]
            try:
                await self._bell.ring(rings)
            except ResponseError as error:
                if "WRONGTYPE" not in str(error):
                    raise
                self._queue_outage(queue).fail(str(error))
            else:
                self._queue_outage(queue).end()
                log.debug("relay.rang", jobs=len(rings))
            self._unrung = [one for one in self._unrung if one.queue != queue]

    def _queue_outage(self, queue: str) -> Outage:
        fresh = Outage(log, "relay.failed", "relay.back", server="redis", queue=queue)
        return self._queue_outages.setdefault(queue, fresh)

    async def _ring_until_none_is_due(self) -> float:
        """Ring, and return how long to wait; a look comes first, since mostly none is due.

        What is due waits for no more than a page of what was lost.
        """
        due_s = await self._seconds_to_next_ring()
        is_any_due = due_s <= 0
        while is_any_due or await self._make_lost_rings_due():
            while len(await self.ring_due()) == BATCH:
                await self._keep_lease()
            is_any_due = False
            due_s = await self._seconds_to_next_ring()
        return min(self._interval_s, max(LEAST_WAIT_S, due_s))

    async def _seconds_to_next_ring(self) -> float:
        due_s = await look(self._sessions, ring.seconds_to_next_ring)
        return self._interval_s if due_s is None else due_s

    async def _notice_new_redis(self) -> None:
        """Owe it to all queued jobs to ring them again, if Redis is new and nobody else does."""
        if self._debt is None and await self._mark.set_if_missing():
            self._debt = _Debt()

    async def _make_lost_rings_due(self) -> bool:
        """Have jobs rung again whose rings are known to be lost; tell whether there were any.

        Of all that are queued it is a page at a time.
        """
        if await self._make_page_due():
            return True
        unclaimed = frozenset(self._unclaimed)
        if unclaimed:
            await brief(
                self._sessions,
                lambda session: ring.ring_again(session, unclaimed),
                name="relay.ring_again",
            )
            self._unclaimed -= unclaimed
        return bool(unclaimed)

    async def _make_page_due(self) -> bool:
        """Make due the next of all queued jobs, if they are owed; False when there is none left.

        The mark lasts only once all jobs are due, in case this relay dies on the way.
        """
        await self._keep_lease()
        if (debt := self._debt) is None:
            return False
        if (page := await self._next_page(debt)) is not None:
            debt.after, debt.jobs = page.last, debt.jobs + page.jobs
            return True
        if debt.jobs:
            log.warning("relay.rings_lost", jobs=debt.jobs, remedy="all queued jobs are rung again")
        await self._mark.keep()
        self._debt = None
        return False

    async def _next_page(self, debt: _Debt) -> ring.Page | None:
        """What is queued after the first look has a ring that is not lost."""
        if (last := debt.last or await look(self._sessions, ring.last_queued)) is None:
            return None
        debt.last = last
        return await brief(
            self._sessions,
            lambda session: ring.ring_page_again(session, debt.after, last, PAGE),
            name="relay.ring_again",
        )

    async def _keep_lease(self) -> None:
        if self._debt is not None:
            await self._mark.keep_lease()

    async def _sweep_now_and_then(self) -> None:
        if time.monotonic() - self._swept_s < SWEEP_INTERVAL_S:
            return
        self._swept_s = time.monotonic()
        if await may_evict(self._redis):
            self._evicting.fail("it may throw signals away when its memory is full", remedy=_KEEP)
        else:
            self._evicting.end()
        for queue in self._queues:
            await self._sweep(queue)

    async def _sweep(self, queue: str) -> None:
        """Take out rings of jobs that have ended: a worker that dies may leave them behind."""
        names = await self._bell.oldest(queue)
        ids = {name: job_id_of(name) for name in names}
        ended = await brief(
            self._sessions,
            lambda session: ring.ended_among(session, set(ids.values())),
            name="relay.sweep",
        )
        await self._bell.silence(queue, [name for name, job_id in ids.items() if job_id in ended])
