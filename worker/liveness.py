"""The beat: a thread that says that this process lives and which claims it holds.

It is a thread of its own, with a connection of its own, so that a busy event loop does not look
dead. It also says when the loop is blocked, and ends the process when a job overruns its limit,
since nothing else can.
"""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from uuid import UUID

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from db.engine import make_sessions
from db.ledger import worker
from db.retry import DATABASE_ERRORS, describe
from db.transaction import look
from worker.loop_watch import LoopWatch
from worker.outage import Outage

OVERRUN_GRACE_S = 30.0
BLOCKED_AFTER_S = 1.0
"""How long an event loop may give no sign, at least; a beat in any case."""
EXIT_OVERRUN = 70
EXIT_SILENT = 71
log = structlog.get_logger("bulwark.liveness")


class Liveness:
    """The beating of one worker row; `make_engine` is called in the thread, for it alone."""

    def __init__(
        self, worker_id: UUID, make_engine: Callable[[], AsyncEngine], interval_s: float
    ) -> None:
        self._worker_id = worker_id
        self._make_engine = make_engine
        self._interval_s = interval_s
        self._deadlines: dict[UUID, float] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._retiring = threading.Event()
        self._outage = Outage(log, "beat.missed", "beat.back", worker=str(worker_id))
        self._missed_s = float("-inf")
        self._watch: LoopWatch | None = None
        self._thread = threading.Thread(target=self._run, name="bulwark-beat", daemon=True)

    @property
    def is_known(self) -> bool:
        """Whether PostgreSQL took the last beat."""
        return not self._outage.lasts

    def has_missed_since(self, since_s: float) -> bool:
        """Whether PostgreSQL has failed to take a beat after this moment of time.monotonic()."""
        return self._missed_s > since_s

    @property
    def is_retiring(self) -> bool:
        """Whether the process is about to end."""
        return self._retiring.is_set()

    def start(self) -> None:
        """Begin to beat, and to watch the running event loop."""
        self._watch = LoopWatch(max(BLOCKED_AFTER_S, self._interval_s))
        self._thread.start()

    def stop(self) -> None:
        """Stop beating; returns when the thread has ended."""
        self._stopping.set()
        self._thread.join()

    def retire(self) -> None:
        """The process is about to end: should it be declared lost, it does not start anew."""
        self._retiring.set()

    def hold(self, claim_id: UUID) -> None:
        """Name this claim in every beat from now on; to be called before it is made."""
        with self._lock:
            self._deadlines[claim_id] = float("inf")

    def limit(self, claim_id: UUID, timeout_s: float) -> None:
        """End the process should the claim still be held that long from now, plus a grace."""
        with self._lock:
            self._deadlines[claim_id] = time.monotonic() + timeout_s + OVERRUN_GRACE_S

    def unlimit(self, claim_id: UUID) -> None:
        """The job itself has come to its end; only its outcome is still to be written."""
        self.hold(claim_id)

    def release(self, claim_id: UUID) -> None:
        """Name this claim no more."""
        with self._lock:
            self._deadlines.pop(claim_id, None)

    def _run(self) -> None:
        """Beat; a process that cannot beat any more ends, since it would work on in vain."""
        try:
            asyncio.run(self._beat_until_stopped())
        finally:
            if not self._stopping.is_set():
                log.critical("worker.silent", worker=str(self._worker_id), exc_info=sys.exception())
                os._exit(EXIT_SILENT)

    async def _beat_until_stopped(self) -> None:
        engine = self._make_engine()
        try:
            while not self._stopping.is_set():
                self._end_overrun()
                if self._watch is not None:
                    self._watch.look()
                wait_s = self._interval_s
                try:
                    async with asyncio.timeout(self._interval_s):
                        alive = await self._beat(engine)
                except (TimeoutError, *DATABASE_ERRORS) as error:
                    self._missed_s = time.monotonic()
                    wait_s = min(wait_s, self._outage.fail(describe(error)))
                else:
                    self._outage.end()
                    if not alive and not self._retiring.is_set():
                        self._start_anew()
                await asyncio.to_thread(self._stopping.wait, wait_s)
        finally:
            await engine.dispose()

    async def _beat(self, engine: AsyncEngine) -> bool:
        with self._lock:
            claims = list(self._deadlines)
        return await look(  # a statement that commits itself, and may be repeated
            make_sessions(engine), lambda session: worker.beat(session, self._worker_id, claims)
        )

    def _end_overrun(self) -> None:
        now = time.monotonic()
        with self._lock:
            late = [str(claim) for claim, deadline in self._deadlines.items() if deadline < now]
        if late:
            log.critical("worker.overrun", worker=str(self._worker_id), claims=late)
            os._exit(EXIT_OVERRUN)

    def _start_anew(self) -> None:
        """Replace this process by a fresh one: its claims were taken back, nothing is left to save.

        The connections close with it, so PostgreSQL rolls back what was still open. A SIGTERM
        waits until the fresh process takes its signals, unless the main thread is just taking it.
        """
        log.error("worker.lost", worker=str(self._worker_id), remedy="this process starts anew")
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        if self._retiring.is_set():
            return
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
