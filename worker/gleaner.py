"""Taking up what was heard in vain, by workers that do not know its kind: jobs, and messages."""

import asyncio
from collections.abc import Collection, Sequence
from contextlib import suppress
from uuid import UUID

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.ledger import ring
from db.retry import DATABASE_ERRORS, describe
from db.transaction import look
from jobs._bell import Bell
from jobs._discovery import Jobs
from worker.adopting import adopt_known
from worker.ear import Ear
from worker.outage import Outage

PAGE = 1000
GLEAN_INTERVAL_S = 2.0
LOOK_INTERVAL_S = 10.0
"""Where all live workers know all kinds: how late, at most, it is noticed that one does not."""
ADOPT_FOR_S = 1.0
"""How long jobs that nobody hears wait for parked messages, at a time."""
_FIRST = UUID(int=0)
log = structlog.get_logger("bulwark.gleaner")


class Gleaner:
    """One worker's: it hands queued jobs that Redis has no ring of to the worker's own ear.

    At the start all kinds that the worker knows are gone through, since nobody may have known them
    before; afterwards those that a live worker on the same queues does not know, or, being of an
    older program, does not say that it knows. To ring them again would be to ring for the others,
    too. A job that somebody is just claiming is handed over in vain, which does no harm.

    Messages of plain arq clients that such workers have parked it makes jobs, at every round.
    """

    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        redis: Redis,
        ear: Ear,
        queues: Sequence[str],
        jobs: Jobs,
    ) -> None:
        self._sessions = sessions
        self._bell = Bell(redis)
        self._ear = ear
        self._queues = list(queues)
        self._jobs = jobs
        self._has_begun = False
        self._is_asked = asyncio.Event()
        self._outage = Outage(log, "glean.failed", "glean.back")

    async def run_forever(self) -> None:
        """Glean until cancelled; while PostgreSQL or Redis is away, say so and try again."""
        while True:
            wait_s = GLEAN_INTERVAL_S
            try:
                if not await self.glean():
                    wait_s = LOOK_INTERVAL_S
                if await self.adopt():
                    wait_s = 0.0
            except (RedisError, *DATABASE_ERRORS) as error:
                self._outage.fail(describe(error))
            else:
                self._outage.end()
            with suppress(TimeoutError):  # a ring that is heard in vain gives no sign
                async with asyncio.timeout(wait_s):
                    await self._is_asked.wait()

    def go_through_all(self) -> None:
        """Look at once for all jobs that Redis has no ring of: somebody died who may have heard."""
        self._has_begun = False
        self._is_asked.set()

    async def glean(self) -> bool:
        """Go through the queue once, if there is anything to look for; tell whether there was."""
        self._is_asked.clear()
        kinds = [*self._jobs]
        if self._has_begun:
            kinds = await look(
                self._sessions, lambda s: ring.kinds_strange_to_others(s, kinds, self._queues)
            )
        after: UUID | None = _FIRST if kinds else None
        while after is not None:
            after = await self._glean_page(kinds, after)
        self._has_begun = not self._is_asked.is_set()
        return bool(kinds)

    async def adopt(self) -> bool:
        """Make jobs of parked messages for a while; tell whether more of them may be left."""
        return await adopt_known(self._sessions, self._jobs, self._queues, ADOPT_FOR_S)

    async def _glean_page(self, kinds: Collection[str], after: UUID) -> UUID | None:
        """Returns the last job of the page, None when no other follows."""
        page = await look(self._sessions, lambda s: ring.queued_page(s, after, PAGE))
        rung = [
            one.ring
            for one in page
            if one.is_rung and one.ring.kind in kinds and one.ring.queue in self._queues
        ]
        unheard = await self._bell.missing(rung)
        if unheard:
            log.info("glean.found", jobs=len(unheard))
            await self._ear.overhear(unheard)
        return page[-1].ring.job_id if len(page) == PAGE else None
