"""Advisory progress: how far a job says it is that commits everything at its end, or why it pauses.

It is written beside the job's transaction, which may still be rolled back, and proves nothing.
"""

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import TIMESTAMP, insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

from db.ledger.job import SCHEMA, Claim

progress = sa.Table(
    "progress",
    SQLModel.metadata,
    sa.Column("job_id", sa.Uuid, primary_key=True),
    sa.Column("claim_id", sa.Uuid, nullable=False),
    sa.Column("rows", sa.BigInteger, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("at", TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
    sa.Column("note", sa.Text),
    schema=SCHEMA,
)


async def tell(session: AsyncSession, held: Claim, rows: int, read_bytes: int) -> None:
    """Say how far the job is, in place of what was said before."""
    values = {"claim_id": held.claim_id, "rows": rows, "bytes": read_bytes, "at": sa.func.now()}
    said = insert(progress).values(job_id=held.job_id, **values)
    await session.execute(said.on_conflict_do_update(index_elements=["job_id"], set_=values))


async def tell_pause(session: AsyncSession, held: Claim, reason: str) -> None:
    """Say what the job waits for, in place of what was said before."""
    values = {"claim_id": held.claim_id, "rows": 0, "bytes": 0, "at": sa.func.now()}
    values["note"] = reason
    said = insert(progress).values(job_id=held.job_id, **values)
    await session.execute(said.on_conflict_do_update(index_elements=["job_id"], set_=values))


async def forget(session: AsyncSession, held: Claim) -> None:
    """Take back what was said: from here on the receipts tell."""
    await session.execute(sa.delete(progress).where(progress.c.job_id == held.job_id))
