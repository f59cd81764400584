"""A worker in the test's own process: the real execution on a real database, without Redis."""

import os
import socket
from collections.abc import Sequence
from datetime import datetime
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.engine import PoolProfile, create_engine
from db.ledger import worker
from db.registry import Registry
from db.transaction import transaction
from jobs._discovery import Jobs
from jobs._housekeeping import Housekeeping
from jobs._producer import Producer
from jobs._sources.place import ImportPlace
from worker.executor import Executor
from worker.liveness import Liveness
from worker.reports import JobReport, read_job

BEAT_INTERVAL_S = 5.0
LOST_AFTER_S = 15.0
MOST_RUNS = 1000

_MAKE_DUE = sa.text(
    "UPDATE bulwark.job SET run_at = now(), next_ring_at = now() "
    "WHERE state = 'queued' AND run_at > now()"
)
_DUE = sa.text(
    "SELECT id, kind, run_at FROM bulwark.job WHERE state = 'queued' AND run_at <= now() "
    "ORDER BY priority DESC, run_at, id"
)


class EndlessJobs(Exception):
    """Jobs are queued as fast as they are run."""


class InProcessWorker:
    """Runs jobs when it is told to, one delivery at a time, and never by itself.

    Each delivery is that of a worker that has just started; it does not beat, so that nothing goes
    on when a test has ended.
    """

    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        database_url: str,
        jobs: Jobs,
        models: Registry,
        *,
        import_folders: Sequence[ImportPlace] = (),
        housekeeping: Housekeeping | None = None,
    ) -> None:
        self.sessions = sessions
        self.jobs = jobs
        self.models = models
        self.producer = Producer(sessions, jobs)
        self.import_folders = list(import_folders)
        self.housekeeping = housekeeping or Housekeeping()
        self.worker_id = uuid4()
        self._database_url = database_url

    async def run_jobs(
        self, *, with_scheduled: bool = False, most_runs: int = MOST_RUNS
    ) -> list[JobReport]:
        """Run what is queued and due, in all queues, until nothing is; what jobs enqueue, too.

        Returns each job that was run, at its end, in the order of the first runs. With
        `with_scheduled` what is to run later, or again, is due at once; else it stays queued.
        A job that raises does not raise here: it is reported as failed, or as queued again. Raises
        EndlessJobs after so many runs.
        """
        ran: dict[UUID, None] = {}
        planned: dict[UUID, datetime] = {}
        runs = 0
        due = await self._due(planned, with_scheduled=with_scheduled)
        while due:
            first = next(iter(due))
            if (runs := runs + 1) > most_runs:
                raise EndlessJobs(
                    f"After {most_runs} runs a {due[first]} is still queued: "
                    "do jobs enqueue themselves, or put themselves off again and again?"
                )
            await self.deliver(first, due[first])
            left = await self._due(planned, with_scheduled=with_scheduled)
            ran |= {one: None for one in due if one == first or one not in left}
            due = left
        return [await self.report(job_id) for job_id in ran]

    async def report(self, job_id: UUID) -> JobReport:
        """What `bulwark job` shows of a job."""
        async with self.sessions() as session:
            return await read_job(session, job_id, LOST_AFTER_S)

    async def deliver(self, job_id: UUID, kind: str | None = None) -> None:
        """Deliver a job once; told its kind, it goes together with others that wait."""
        executor = await self.register()
        await executor.deliver(job_id, kind)
        self.worker_id = uuid4()

    async def register(self) -> Executor:
        """Make the worker's row, and the executor that claims for it."""
        worker_id = self.worker_id  # of deliveries beside each other the first that ends changes it
        await transaction(
            self.sessions,
            lambda s: worker.register(s, worker_id, socket.gethostname(), os.getpid(), ["default"]),
            name="test.register",
        )
        liveness = Liveness(
            worker_id,
            lambda: create_engine(
                self._database_url, profile=PoolProfile.LIGHT, application_name="beat"
            ),
            BEAT_INTERVAL_S,
        )
        return Executor(
            worker_id,
            self.sessions,
            self.jobs,
            self.models,
            self.import_folders,
            liveness,
            self.housekeeping,
        )

    async def _due(self, planned: dict[UUID, datetime], *, with_scheduled: bool) -> dict[UUID, str]:
        """The kinds of the jobs that are due, by id, in the order of running.

        Those that were due before at another time, which is noted in `planned`, are to be tried
        again or were put off: they are scheduled, too, however soon they are due again.
        """
        async with self.sessions.begin() as session:
            if with_scheduled:
                await session.execute(_MAKE_DUE)
            return {
                row.id: row.kind
                for row in await session.execute(_DUE)
                if planned.setdefault(row.id, row.run_at) == row.run_at or with_scheduled
            }
