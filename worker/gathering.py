"""Deliveries of one kind of job that wait for each other, so that one can carry out many."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import islice
from uuid import UUID

MOST_BATCHES = 2
"""One works while the other waits for an answer; the next gathers meanwhile."""
MOST_TOGETHER = 100
FEW_TOGETHER = 8
"""As many are claimed where nothing says that more wait: to ask for more costs time, too."""


class Turn(Enum):
    """What becomes of a delivery that waited."""

    LEADS = auto()
    TAKEN = auto()
    ALONE = auto()


@dataclass
class Batch:
    """What one delivery carries out: the jobs that were heard of, its own first.

    As far as there is room, others come along that were not heard of.
    """

    heard: list[UUID]
    room: int
    _turns: dict[UUID, asyncio.Future[Turn]]

    def settle(self, alone: frozenset[UUID]) -> None:
        """Let the others go: these go on by themselves, the rest has nothing left to do."""
        for job_id, turn in self._turns.items():
            if not turn.done():
                turn.set_result(Turn.ALONE if job_id in alone else Turn.TAKEN)

    def leave_alone(self) -> None:
        """Let all go on by themselves that are still waiting."""
        self.settle(frozenset(self._turns))


@dataclass
class Gathering:
    """Who leads a batch of one kind, and who waits to be taken along.

    Nobody waits for a batch to fill: who finds a free place leads at once. Whether the last batch
    was full says how many may come along in the next.
    """

    is_crowded: bool = False

    _waiting: dict[UUID, asyncio.Future[Turn]] = field(default_factory=dict)
    _leading: int = 0
    _is_forming: bool = False

    async def turn(self, job_id: UUID) -> Turn:
        """What this delivery is to do; one that leads has to enter `batch` next, at once."""
        if job_id in self._waiting:
            return Turn.TAKEN
        mine: asyncio.Future[Turn] = asyncio.get_running_loop().create_future()
        self._waiting[job_id] = mine
        self._appoint()
        try:
            return await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled() and mine.result() is Turn.LEADS:
                self._is_forming = False
                self._step_down()
            raise
        finally:
            if self._waiting.get(job_id) is mine:
                del self._waiting[job_id]

    @asynccontextmanager
    async def batch(self, job_id: UUID) -> AsyncIterator[Batch]:
        """Lead: take along who waits. Afterwards nobody that was taken along waits any more."""
        try:
            try:
                await asyncio.sleep(0)  # no pause: what was heard in the same breath comes to wait
            finally:
                self._is_forming = False
            batch = self._take_along(job_id)
            try:
                yield batch
            finally:
                batch.leave_alone()
        finally:
            self._step_down()

    def _appoint(self) -> None:
        """Let the first that waits lead, where there is a place and nobody is about to lead."""
        if self._leading == MOST_BATCHES or self._is_forming:
            return
        for job_id, turn in self._waiting.items():
            if not turn.done():
                self._leading += 1
                self._is_forming = True
                del self._waiting[job_id]
                turn.set_result(Turn.LEADS)
                return

    def _take_along(self, job_id: UUID) -> Batch:
        turns = dict(islice(self._waiting.items(), MOST_TOGETHER - 1))
        for one in turns:
            del self._waiting[one]
        self._appoint()
        heard = list(dict.fromkeys([job_id, *turns]))
        many = self.is_crowded or len(heard) > 1
        return Batch(heard, MOST_TOGETHER if many else FEW_TOGETHER, turns)

    def _step_down(self) -> None:
        self._leading -= 1
        self._appoint()
