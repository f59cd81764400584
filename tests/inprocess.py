"""Running jobs in the test's own process, and looking at what they have left behind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.ledger import audit, chunk, job
from db.ledger.verdict import RowVerdict, read_verdicts
from db.registry import Registry, discover_models
from jobs._declaration import Payload
from jobs._discovery import Jobs, discover_jobs
from jobs._input import InPlace
from jobs._sources.format import Shape
from jobs._spooling import enqueue_file
from jobs.insert_rows import InsertRows
from worker.testing.in_process import InProcessWorker

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


class Bench(InProcessWorker):
    """A worker that runs what it is told to run, and a look at what became of it."""

    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        url: str,
        jobs: Jobs | None = None,
        models: Registry | None = None,
    ) -> None:
        super().__init__(sessions, url, jobs or discover_jobs(), models or discover_models())

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
