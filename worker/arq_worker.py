"""arq's worker, with a loop that is woken, serves several queues, and outlives Redis."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import arq.worker
import structlog
from arq.typing import WorkerCoroutine
from arq.version import VERSION
from arq.worker import Function, func
from redis.exceptions import RedisError

from db.errors import BulwarkError
from worker.ear import Ear, Message
from worker.outage import Outage

CLOSE_TIMEOUT_S = 6.0
"""For deliveries that do not end when they are cancelled; to give one back takes 5 s at most."""
CLAIM_WAIT_S = 0.2
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
    `carry_out` is given each message in a task of its own.
    """

    def __init__(
        self,
        ear: Ear,
        carry_out: Callable[[Message], Awaitable[None]],
        kinds: Iterable[str],
        may_claim: Callable[[], bool] = lambda: True,
        **options: Any,
    ) -> None:
        require_arq()
        super().__init__(functions_named(kinds), poll_delay=0, handle_signals=False, **options)
        self._ear = ear
        self._carry_out = carry_out
        self._may_claim = may_claim
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
                await self._ear.wait()
        except (RedisError, OSError) as error:
            wait_s = self._outage.fail(str(error), remedy="running jobs go on")
            await asyncio.sleep(wait_s)  # nothing tells that Redis is back

    async def _start_due(self, most: int) -> int:
        messages = await self._ear.claim(most)
        self._outage.end()
        for message in messages:
            task = asyncio.ensure_future(self._carry_out(message))
            self._running.add(task)
            task.add_done_callback(self._ended)
        return len(messages)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._freed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("delivery.failed", exc_info=error)

    async def close(self) -> None:
        """Let deliveries come to their end, then close; Redis, which may be away, is not asked."""
        if self._running:
            await asyncio.wait(self._running, timeout=CLOSE_TIMEOUT_S)
        if self.on_shutdown is not None:
            await self.on_shutdown(self.ctx)
        await self._ear.close()
        await self.pool.aclose(close_connection_pool=True)


def functions_named(kinds: Iterable[str]) -> list[Function]:
    """What arq wants to know of jobs; what is carried out is decided elsewhere."""
    never: WorkerCoroutine = _never_called
    return [func(never, name=kind) for kind in kinds]


async def _never_called(ctx: dict[Any, Any], *args: Any, **kwargs: Any) -> None: ...
