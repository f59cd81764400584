"""Around one delivery: claim the job, alone or with others of its kind, and carry it out."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import structlog
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db import steps
from db.errors import CommitUnknown
from db.ledger import job
from db.ledger.claims import claim_many
from db.ledger.job import Claim, Ring
from db.registry import Registry
from db.retry import BUDGETS, DATABASE_ERRORS, classify, describe
from db.steps import Step
from db.transaction import brief
from jobs._declaration import Job
from jobs._discovery import Jobs
from jobs._errors import GivenBack
from jobs._housekeeping import Housekeeping
from jobs._sources.place import ImportPlace
from worker.cancelling import Running
from worker.execution import Execution
from worker.gathering import Batch, Gathering, Turn
from worker.liveness import Liveness
from worker.settling import told_of
from worker.solitude import Solitude

Silence = Callable[[Sequence[Ring]], Coroutine[Any, Any, None]]
log = structlog.get_logger("bulwark.execution")


async def _leave_rings(_: Sequence[Ring]) -> None:
    """Rings of jobs that are claimed do nothing when they are heard."""


@dataclass
class Executor:
    """Carries out deliveries for one worker row.

    `unclaimed` are jobs whose rings were heard in vain, for whoever can have them rung again.
    `silence` takes rings out of Redis whose jobs are claimed already.
    """

    worker_id: UUID
    sessions: async_sessionmaker[AsyncSession]
    jobs: Jobs
    models: Registry
    import_folders: Sequence[ImportPlace]
    liveness: Liveness
    housekeeping: Housekeeping = field(default_factory=Housekeeping)
    solitude: Solitude = field(default_factory=Solitude)
    unclaimed: set[UUID] = field(default_factory=set)
    silence: Silence = _leave_rings
    running: Running = field(default_factory=Running)
    _deliveries: set[asyncio.Task[Any]] = field(default_factory=set)
    _gatherings: defaultdict[str, Gathering] = field(default_factory=lambda: defaultdict(Gathering))
    _turned_away: set[UUID] = field(default_factory=set)
    _stopping: bool = False

    def __post_init__(self) -> None:
        self._execution = Execution(
            self.sessions,
            self.jobs,
            self.models,
            self.import_folders,
            self.liveness,
            self.housekeeping,
            self.running,
        )

    def stop_at_chunks(self) -> None:
        """Give chunked jobs back before their next chunk; all others may go on."""
        self._execution.stopping.set()

    def stop(self) -> None:
        """Give back what still runs, and take nothing more; a second call does nothing."""
        if not self._stopping:
            self._stopping = True
            self._call_turned_away()
            for task in self._deliveries:
                task.cancel()

    async def idle(self) -> None:
        """Wait until no delivery is being carried out."""
        while self._deliveries:
            await asyncio.wait(self._deliveries)

    async def settle(self) -> None:
        """Wait until the jobs that were given back are written."""
        await self._execution.settling.rest()

    async def deliver(self, job_id: UUID, kind: str | None = None) -> None:
        """Run the job if it can be claimed; a delivery that comes twice, or late, does nothing.

        Where its kind is told and has a batch form, it is run together with others that wait.
        When cancelled, the jobs are given back to their queue.
        """
        if self._stopping:
            self.unclaimed.add(job_id)
            return
        delivery = asyncio.current_task()
        assert delivery is not None
        self._deliveries.add(delivery)
        try:
            if not await self._carry_out_together(job_id, kind):
                await self._carry_out(job_id)
        except DATABASE_ERRORS as error:
            self._give_up(job_id, error)
        except GivenBack:
            self.unclaimed.add(job_id)
        except asyncio.CancelledError:
            self.unclaimed.add(job_id)
            raise
        finally:
            self._deliveries.discard(delivery)

    async def _carry_out(self, job_id: UUID) -> None:
        async with self.solitude.together():
            if await self._claim_and_run(job_id, alone=False):
                return
        if await self._waits_for_solitude(job_id):
            async with self.solitude.alone() as alone:
                if alone:
                    try:
                        await self._claim_and_run(job_id, alone=True)
                    finally:
                        self._call_turned_away()
                else:
                    self._turned_away.add(job_id)

    def _call_turned_away(self) -> None:
        """Have the suspects that came in vain rung again: by their age that might take minutes."""
        self.unclaimed |= self._turned_away
        self._turned_away.clear()

    async def _carry_out_together(self, job_id: UUID, kind: str | None) -> bool:
        """Carry it out with others of its kind; tell whether nothing is left to do for it."""
        if kind is None or kind not in self.jobs or self.jobs[kind].batch is None:
            return False
        gathering = self._gatherings[kind]
        turn = await gathering.turn(job_id)
        if turn is not Turn.LEADS:
            return turn is Turn.TAKEN
        async with gathering.batch(job_id) as batch, self.solitude.together():
            return await self._claim_and_run_together(gathering, batch, self.jobs[kind])

    def _give_up(self, job_id: UUID, error: Exception) -> None:
        """Leave the job unclaimed; after an error that will not pass, until its next ring."""
        log.warning("job.not_claimed", job=str(job_id), reason=describe(error))
        if isinstance(error, CommitUnknown) or classify(error) in BUDGETS:
            self.unclaimed.add(job_id)

    async def _claim_and_run(self, job_id: UUID, *, alone: bool) -> bool:
        claim_id = uuid4()
        self.liveness.hold(claim_id)
        try:
            held = await self._claim(job_id, claim_id, alone=alone)
            if held is None:
                return False
            steps.reached(Step.CLAIMED)
            with told_of(held):
                await self._execution.run(held)
            return True
        finally:
            self.liveness.release(claim_id)

    async def _claim(self, job_id: UUID, claim_id: UUID, *, alone: bool) -> Claim | None:
        return await brief(
            self.sessions,
            lambda s: job.claim(s, job_id, claim_id, self.worker_id, alone=alone),
            name="job.claim",
        )

    async def _waits_for_solitude(self, job_id: UUID) -> bool:
        return await brief(
            self.sessions,
            lambda s: job.waits_for_solitude(s, job_id),
            name="job.solitude",
        )

    async def _claim_and_run_together(
        self, gathering: Gathering, batch: Batch, declared: Job[Any]
    ) -> bool:
        room = len(batch.heard) if self.liveness.is_retiring else batch.room
        claim_ids = [uuid4() for _ in range(room)]
        for claim_id in claim_ids:
            self.liveness.hold(claim_id)
        try:
            taken = await brief(
                self.sessions,
                lambda s: claim_many(s, declared.kind, batch.heard, claim_ids, self.worker_id),
                name="job.claim",
            )
            if taken.claims:
                steps.reached(Step.CLAIMED)
            gathering.is_crowded = len(taken.claims) == room
            batch.settle(alone=taken.left)
            if taken.company:
                beside = asyncio.create_task(self.silence(taken.company))
                self._deliveries.add(beside)
                beside.add_done_callback(self._deliveries.discard)
            await self._execution.run_together(declared, taken.claims)
            return batch.heard[0] not in taken.left
        finally:
            for claim_id in claim_ids:
                self.liveness.release(claim_id)
