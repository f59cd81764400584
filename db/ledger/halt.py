"""The kill switch: jobs of a kind that somebody has told to stop, and why."""

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import TIMESTAMP, insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

from db.ledger.job import SCHEMA, Reason, State, job

halt = sa.Table(
    "halt",
    SQLModel.metadata,
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("actor", sa.Text),
    sa.Column("at", TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
    schema=SCHEMA,
)


@dataclass(frozen=True)
class Halt:
    """That the jobs of a kind are to go no further, until it is lifted."""

    kind: str
    reason: str
    actor: str | None
    at: datetime

    def __str__(self) -> str:
        by = f" by {self.actor}" if self.actor else ""
        return f"stopped{by} since {self.at:%Y-%m-%d %H:%M} UTC: {self.reason}"


async def stop(session: AsyncSession, kind: str, reason: str, actor: str | None) -> None:
    """Let the jobs of a kind go no further; the last reason given counts."""
    values = {"reason": reason, "actor": actor, "at": sa.func.now()}
    told = insert(halt).values(kind=kind, **values)
    await session.execute(told.on_conflict_do_update(index_elements=["kind"], set_=values))


async def lift(session: AsyncSession, kind: str) -> bool:
    """Let them go on; those that were put off are due at once. False when nobody had stopped them.

    The relay rings them.
    """
    lifted = await session.execute(
        sa.delete(halt).where(halt.c.kind == kind).returning(halt.c.kind)
    )
    if lifted.one_or_none() is None:
        return False
    deferred = (job.c.kind == kind, job.c.state == State.QUEUED, job.c.reason == Reason.DEFERRED)
    due = {"run_at": sa.func.now(), "next_ring_at": sa.func.now()}
    await session.execute(sa.update(job).where(*deferred, job.c.run_at > sa.func.now()).values(due))
    return True


async def read_halt(session: AsyncSession, kind: str) -> Halt | None:
    """Whether the jobs of a kind are to go no further."""
    at = sa.func.timezone("UTC", halt.c.at).label("at")
    query = sa.select(halt.c.kind, halt.c.reason, halt.c.actor, at).where(halt.c.kind == kind)
    row = (await session.execute(query)).one_or_none()
    return None if row is None else Halt(*row)
