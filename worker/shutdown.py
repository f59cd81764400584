"""Ending in order: on SIGTERM or SIGINT jobs may finish within the grace, then they are given back.

Chunked jobs are given back at their next chunk.

arq's own handling is not used: it cancels its main task once, and redis-py may swallow that
cancellation (asyncio.timeout(0) around a read, seen with 5.3.1), after which arq would run on.
"""

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import FrameType
from typing import Any, TypeVar
from weakref import WeakSet

import asyncpg
import structlog
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry

from worker.executor import Executor

CANCEL_INTERVAL_S = 0.2
SIGNALS = (signal.SIGTERM, signal.SIGINT)
T = TypeVar("T")
log = structlog.get_logger("bulwark.worker")


async def cancel_until_done(task: asyncio.Task[Any]) -> None:
    """Cancel a task until it has ended: one cancellation may be swallowed on the way."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=CANCEL_INTERVAL_S)


async def interruptible(work: Coroutine[Any, Any, T]) -> T:
    """Do the work, for asyncio.run: an interrupt ends it even if it is swallowed on the way.

    A signal that cancels a task while it runs is taken for the end of asyncio.timeout(0), which
    redis-py uses (seen with Python 3.11.7), where the task enters that before it waits for anything
    else.
    """
    task = asyncio.create_task(work)
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        await cancel_until_done(task)
        if not task.cancelled():
            task.exception()  # it is of no interest any more
        raise
    return await task


async def ended_beside(work: Callable[[], None]) -> None:
    """Return when work that blocks has ended; unlike with asyncio.to_thread, who gives up may go.

    The interpreter does not wait for its thread either.
    """
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def run() -> None:
        work()
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=run, daemon=True).start()
    await ended.wait()


class Lines:
    """The connections of an engine, to be cut when PostgreSQL does not answer any more.

    To cancel a statement, or to close a connection, asyncpg asks the server, and waits for it.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._open: WeakSet[asyncpg.Connection] = WeakSet()
        event.listen(engine.sync_engine, "connect", self._note)

    def _note(self, connection: Any, _: ConnectionPoolEntry) -> None:
        self._open.add(connection.driver_connection)

    def cut(self) -> None:
        """End every wait for an answer; PostgreSQL rolls back what was open."""
        for connection in list(self._open):
            connection.terminate()


class Shutdown:
    """Ends one main task, once; a second signal forgoes the rest of the grace.

    `take_no_more` is called at once, so that jobs are left to other workers during the grace.
    """

    def __init__(
        self, main: asyncio.Task[Any], grace_s: float, take_no_more: Callable[[], None]
    ) -> None:
        self._main = main
        self._grace_s = grace_s
        self._take_no_more = take_no_more
        self._executor: Executor | None = None
        self._hurry = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
        self.failure: BaseException | None = None

    @property
    def begun(self) -> bool:
        return self._ending is not None

    def listen(self) -> None:
        """Take the signals from now on; a handler of the loop's own would be gone with the loop."""
        loop = asyncio.get_running_loop()

        def take(number: int, _: FrameType | None) -> None:
            loop.call_soon_threadsafe(self.begin, signal.Signals(number).name)

        for number in SIGNALS:
            signal.signal(number, take)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # one may wait since a start anew

    def ignore_signals(self) -> None:
        """Let signals do nothing any more: all is ended, and only the interpreter is still there.

        With their usual meaning they would turn an end in order into another exit code.
        """
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def spare(self, executor: Executor) -> None:
        """The jobs of this executor get the grace, and are given back after it."""
        self._executor = executor

    def begin(self, cause: str) -> None:
        """Begin to end; called again, hurry up."""
        if self.begun:
            self._hurry.set()
        else:
            log.info("worker.stopping", cause=cause, grace_s=self._grace_s)
            self._take_no_more()
            if self._executor is not None:
                self._executor.liveness.retire()
                self._executor.stop_at_chunks()
            self._ending = asyncio.create_task(self._end())

    def watch(self, task: asyncio.Task[Any]) -> None:
        """End, and fail with its error, when this task fails: the process cannot do without it."""
        task.add_done_callback(self._fallen)

    def _fallen(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failure = self.failure or error
            self.begin(f"{task.get_name()} failed: {error}")

    async def _end(self) -> None:
        if self._executor is not None:
            await self._wait_for_jobs(self._executor)
            self._executor.stop()
        await cancel_until_done(self._main)

    async def _wait_for_jobs(self, executor: Executor) -> None:
        hurry = asyncio.create_task(self._hurry.wait())
        idle = asyncio.create_task(executor.idle())
        await asyncio.wait(
            [hurry, idle], timeout=self._grace_s, return_when=asyncio.FIRST_COMPLETED
        )
        hurry.cancel()
        idle.cancel()
