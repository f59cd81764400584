"""Cancelling: it stops at once the jobs of this worker of which that was asked."""

import asyncio
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.errors import Cancelled
from db.ledger.cancellation import cancelled_at_once
from db.retry import DATABASE_ERRORS
from db.transaction import look

INTERVAL_S = 0.5


def is_told_to_stop() -> bool:
    """Whether a cancellation of this task came from outside, and not out of its own awaiting."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


@dataclass
class _Stint:
    """What one task does under some claims; to stop one of them stops it for all."""

    task: asyncio.Task[None]
    stopped: set[UUID] = field(default_factory=set)

    def stop(self, claim_id: UUID) -> None:
        if not self.stopped:
            self.task.cancel()
        self.stopped.add(claim_id)


class Running:
    """The claims under which one worker is working just now."""

    def __init__(self) -> None:
        self._stints: dict[UUID, _Stint] = {}

    @property
    def claims(self) -> list[UUID]:
        return list(self._stints)

    def stop(self, claim_id: UUID) -> None:
        """Stop the work under this claim wherever it is, if it still goes on."""
        if claim_id in self._stints:
            self._stints[claim_id].stop(claim_id)

    @contextmanager
    def under(self, claim_ids: Collection[UUID]) -> Iterator[Collection[UUID]]:
        """Let the work inside be stopped through any of these claims; gives those it was.

        Raises Cancelled where it was stopped. When the task is to end for another reason as well,
        CancelledError goes on, as that matters more.
        """
        task = asyncio.current_task()
        assert task is not None
        stint = _Stint(task)
        self._stints.update(dict.fromkeys(claim_ids, stint))
        try:
            yield stint.stopped
        except asyncio.CancelledError as error:
            if stint.stopped and task.cancelling() == 1:
                raise Cancelled from error
            raise
        finally:
            for claim_id in claim_ids:
                del self._stints[claim_id]
            if stint.stopped:
                task.uncancel()


class Canceller:
    """One worker's; it asks PostgreSQL only while jobs run."""

    def __init__(self, sessions: async_sessionmaker[AsyncSession], running: Running) -> None:
        self._sessions = sessions
        self._running = running

    async def run_forever(self) -> None:
        """Stop jobs until cancelled itself."""
        while True:
            if running := self._running.claims:
                try:
                    claims = await look(self._sessions, lambda s: cancelled_at_once(s, running))
                except DATABASE_ERRORS:
                    claims = []  # the beat says that PostgreSQL is away
                for claim_id in claims:
                    self._running.stop(claim_id)
            await asyncio.sleep(INTERVAL_S)  # the one who cancels is no worker, and has no bell
