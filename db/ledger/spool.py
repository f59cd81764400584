"""The spool: input files in packed parts in PostgreSQL, so that the worker may be elsewhere."""

from collections.abc import AsyncIterable
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

from db.copy import copy_records
from db.ledger.job import SCHEMA, State, job

spool = sa.Table(
    "spool",
    SQLModel.metadata,
    sa.Column("job_id", sa.Uuid, primary_key=True),
    sa.Column("part_no", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
    schema=SCHEMA,
    postgresql_partition_by="RANGE (job_id)",
)


async def write_parts(session: AsyncSession, job_id: UUID, parts: AsyncIterable[bytes]) -> int:
    """Spool packed parts in order, one in memory at a time, in the caller's transaction."""
    number = 0
    async for part in parts:
        await copy_records(session, spool, ("job_id", "part_no", "data"), [(job_id, number, part)])
        number += 1
    return number


async def read_part(session: AsyncSession, job_id: UUID, part_no: int) -> bytes | None:
    """One packed part, or None behind the last."""
    return await session.scalar(
        sa.select(spool.c.data).where(spool.c.job_id == job_id, spool.c.part_no == part_no)
    )


async def is_spooled(session: AsyncSession, job_id: UUID) -> bool:
    """Whether the job's first part is there; to know it takes no right to read what it holds."""
    found = sa.select(spool.c.part_no).where(spool.c.job_id == job_id, spool.c.part_no == 0)
    return await session.scalar(found) is not None


async def drop_finished(session: AsyncSession, most: int) -> int:
    """Delete parts of jobs that succeeded, a batch at a time. Returns how many went."""
    done = (
        sa.select(spool.c.job_id, spool.c.part_no)
        .join(job, job.c.id == spool.c.job_id)
        .where(job.c.state == State.SUCCEEDED)
        .limit(most)
    )
    gone = await session.execute(
        sa.delete(spool)
        .where(sa.tuple_(spool.c.job_id, spool.c.part_no).in_(done))
        .returning(spool.c.part_no)
    )
    return len(gone.all())
