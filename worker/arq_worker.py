"""arq's worker, with a loop that is woken, serves several queues, and outlives Redis."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any

import arq.worker
import structlog
from arq.typing import WorkerCoroutine
from arq.version import VERSION
from arq.worker import Function, func
from redis.exceptions import RedisError

from db.errors import BulwarkError
from worker.ear import Ear
from worker.message import Message
from worker.outage import Outage
from worker.redis_pool import close_redis

CLOSE_TIMEOUT_S = 6.0
"""For deliveries that do not end when they are cancelled; to give one back takes 5 s at most."""
CLAIM_WAIT_S = 0.2
LOOK_WAIT_S = 0.05
"""How often it looks for other jobs while bulk jobs have all the slots that they may have."""
NEEDED_OF_ARQ = ("main", "async_run", "close", "_poll_iteration")
log = structlog.get_logger("bulwark.worker")


class ArqChanged(BulwarkError):
    """arq lacks something that this worker needs of it; install the version that is pinned."""


def require_arq() -> None:
    """Raise ArqChanged unless arq has the private names that are overridden here."""
    for name in NEEDED_OF_ARQ:
        if not hasattr(arq.worker.Worker, name):
            raise ArqChanged(f"arq {VERSION} has no Worker.{name}; install the version pinned")


class ArqWorker(arq.worker.Worker):
    """Fills its free slots by one call to Redis, then waits to be woken.

    While Redis is away, running jobs go on. While it may not claim, messages are left to others.
    `carry_out` is given each message in a task of its own. Jobs of a priority below 0 get no more
    than `bulk_slots` of the slots, so that the others need not wait for their ends.
    """

    def __init__(
        self,
        ear: Ear,
        carry_out: Callable[[Message], Awaitable[None]],
        kinds: Iterable[str],
        may_claim: Callable[[], bool] = lambda: True,
        bulk_slots: int | None = None,
        **options: Any,
    ) -> None:
        require_arq()
        super().__init__(functions_named(kinds), poll_delay=0, handle_signals=False, **options)
        self._ear = ear
        self._carry_out = carry_out
        self._may_claim = may_claim
        self._bulk_slots = self.max_jobs if bulk_slots is None else bulk_slots
        self._low: set[asyncio.Task[None]] = set()
        self._running: set[asyncio.Task[None]] = set()
        self._freed = asyncio.Event()
        self._outage = Outage(log, "worker.redis_lost", "worker.redis_back")

    async def _poll_iteration(self) -> None:
        """Called by arq again and again: start what is due, or wait until something changes."""
        self._freed.clear()
        free = self.max_jobs - len(self._running)
        if not self.allow_pick_jobs or free == 0:
            await self._freed.wait()
            return
        if not self._may_claim():
            await asyncio.sleep(CLAIM_WAIT_S)  # nothing tells that it may again
            return
        try:
            if await self._start_due(free) < free:
                await self._wait()
        except (RedisError, OSError) as error:
            wait_s = self._outage.fail(str(error), remedy="running jobs go on")
            await asyncio.sleep(wait_s)  # nothing tells that Redis is back

    async def _start_due(self, most: int) -> int:
        messages = await self._ear.claim(most, self._bulk_slots - len(self._low))
        self._outage.end()
        for message in messages:
            task = asyncio.ensure_future(self._carry_out(message))
            self._running.add(task)
            if message.is_low:
                self._low.add(task)
            task.add_done_callback(self._ended)
        return len(messages)

    async def _wait(self) -> None:
        """Until a bell wakes us; it wakes for bulk jobs, too, which may just not be taken."""
        if len(self._low) < self._bulk_slots:
            await self._ear.wait()
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_WAIT_S):
                await self._freed.wait()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._low.discard(task)
        self._freed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("delivery.failed", exc_info=error)

    async def close(self) -> None:
        """Let deliveries come to their end, then close; Redis, which may be away, is not asked."""
        if self._running:
            await asyncio.wait(self._running, timeout=CLOSE_TIMEOUT_S)
        try:
            if self.on_shutdown is not None:
                await self.on_shutdown(self.ctx)
        finally:
            await self._ear.close()
            await close_redis(self.pool)


def functions_named(kinds: Iterable[str]) -> list[Function]:
    """What arq wants to know of jobs; what is carried out is decided elsewhere."""
    never: WorkerCoroutine = _never_called
    return [func(never, name=kind) for kind in kinds]


async def _never_called(ctx: dict[Any, Any], *args: Any, **kwargs: Any) -> None: ...
