"""Running jobs in the test's own process: the real executor, on a real database, without arq."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.engine import PoolProfile, create_engine
from db.ledger import audit, chunk, job, worker
from db.ledger.verdict import RowVerdict, read_verdicts
from db.registry import Registry, discover_models
from db.transaction import transaction
from jobs._declaration import Payload
from jobs._discovery import Jobs, discover_jobs
from jobs._housekeeping import Housekeeping
from jobs._input import InPlace
from jobs._producer import Producer
from jobs._sources.format import Shape
from jobs._sources.place import ImportPlace
from jobs._spooling import enqueue_file
from jobs.insert_rows import InsertRows
from worker.execution import Executor
from worker.liveness import Liveness

Way = Literal["in place", "spooled"]
"""How a file gets to the worker."""

BOMB = """
    CREATE FUNCTION explode() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.name = 'bomb' THEN
            RAISE EXCEPTION 'the disk is gone' USING ERRCODE = '58000';
        END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER explode BEFORE INSERT ON team FOR EACH ROW EXECUTE FUNCTION explode();
"""
"""Fails each transaction that inserts a team named bomb."""


class Bench:
    """A registered worker that runs what it is told to run, one job at a time."""

    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        url: str,
        jobs: Jobs | None = None,
        models: Registry | None = None,
    ) -> None:
        self.sessions = sessions
        self.jobs = jobs or discover_jobs()
        self.models = models or discover_models()
        self.worker_id = uuid4()
        self.producer = Producer(sessions, self.jobs)
        self.import_folders: list[ImportPlace] = []
        self.housekeeping = Housekeeping()
        self._url = url

    async def register(self) -> Executor:
        """Make the worker's row, and the executor that claims for it."""
        await transaction(
            self.sessions,
            lambda s: worker.register(
                s, self.worker_id, socket.gethostname(), os.getpid(), ["default"]
            ),
            name="test.register",
        )
        liveness = Liveness(
            self.worker_id,
            lambda: create_engine(self._url, profile=PoolProfile.LIGHT, application_name="beat"),
            5.0,
        )
        return Executor(
            self.worker_id,
            self.sessions,
            self.jobs,
            self.models,
            self.import_folders,
            liveness,
            self.housekeeping,
        )

    async def run(self, payload: Payload) -> UUID:
        """Enqueue a job and deliver it once."""
        accepted = await self.producer.enqueue(payload)
        await self.deliver(accepted.job_id)
        return accepted.job_id

    async def run_file(self, path: Path, way: Way, **request: Any) -> UUID:
        """Enqueue the import of a file, to be read where it is or from the spool; deliver it once.

        Raises what the producer raises about a file that it does not accept.
        """
        job_id = await self.enqueue_file(path, way, **request)
        await self.deliver(job_id)
        return job_id

    async def enqueue_file(
        self, path: Path, way: Way, *, declared: Shape | None = None, **request: Any
    ) -> UUID:
        """Enqueue the import of a file without running it; `request` is for InsertRows."""
        declared = declared or Shape()
        if way == "spooled":
            return (await enqueue_file(self.producer, path, request, declared=declared)).job_id
        source = InPlace(type="in_place", path=str(path), **declared.model_dump())
        return (await self.producer.enqueue(InsertRows(**request, source=source))).job_id

    async def deliver(self, job_id: UUID) -> None:
        """Deliver a job to a worker that has just started."""
        executor = await self.register()
        await executor.deliver(job_id)
        self.worker_id = uuid4()

    async def job(self, job_id: UUID) -> sa.Row[*tuple[object, ...]]:
        """The job's row."""
        async with self.sessions() as session:
            return (await session.execute(sa.select(job.job).where(job.job.c.id == job_id))).one()

    async def counts(self, job_id: UUID) -> Mapping[str, int]:
        """How many rows got each verdict, over all chunks."""
        return (await self.tally(job_id)).counts

    async def tally(self, job_id: UUID) -> chunk.Tally:
        """What the receipts of all chunks add up to."""
        async with self.sessions() as session:
            return await chunk.tally(session, job_id)

    async def audit(self, job_id: UUID) -> list[Mapping[str, Any]]:
        """The job's lines of the audit in order."""
        async with self.sessions() as session:
            return await audit.read_entries(session, job_id=job_id, most=1_000_000)

    async def verdicts(self, job_id: UUID) -> list[RowVerdict]:
        """The per-row records in input order."""
        async with self.sessions() as session:
            return await read_verdicts(session, job_id, most=1_000_000)
