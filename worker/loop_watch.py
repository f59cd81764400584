"""Watching the event loop from beside: it says that a job blocks it, and where."""

import asyncio
import sys
import threading
import time
import traceback

import structlog

STACK_CHARS = 2000
log = structlog.get_logger("bulwark.liveness")


class LoopWatch:
    """Made in the loop's thread, for another thread that looks now and then."""

    def __init__(self, blocked_after_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._blocked_after_s = blocked_after_s
        self._asked_s: float | None = None
        self._is_told = False

    def look(self) -> None:
        """Ask the loop for a sign; say once that it gives none, with what it is busy with."""
        now_s = time.monotonic()
        if self._asked_s is None:
            self._asked_s = now_s
            self._loop.call_soon_threadsafe(self._answer)
        elif not self._is_told and now_s - self._asked_s >= self._blocked_after_s:
            self._is_told = True
            log.warning(
                "worker.blocked",
                for_s=round(now_s - self._asked_s, 1),
                stack=self._stack(),
                remedy="let the job await, or run what takes long in a thread",
            )

    def _answer(self) -> None:
        if self._is_told and self._asked_s is not None:
            log.info("worker.unblocked", after_s=round(time.monotonic() - self._asked_s, 1))
        self._asked_s, self._is_told = None, False

    def _stack(self) -> str:
        frames = sys._current_frames()  # noqa: SLF001 - documented, and the only way to see it
        frame = frames.get(self._thread)
        return "".join(traceback.format_stack(frame))[-STACK_CHARS:] if frame else ""
