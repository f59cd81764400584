"""How many jobs may wait in a queue before producers are turned away."""

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import TIMESTAMP, insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

from db.ledger.job import SCHEMA

depth_limit = sa.Table(
    "depth_limit",
    SQLModel.metadata,
    sa.Column("queue", sa.Text, primary_key=True),
    sa.Column("most", sa.Integer, nullable=False),
    sa.Column("actor", sa.Text),
    sa.Column("at", TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
    sa.CheckConstraint("most >= 0", name="most"),
    schema=SCHEMA,
)


@dataclass(frozen=True)
class Depth:
    """How many jobs wait in a queue, and how many may; `most` is None where any number may."""

    queue: str
    queued: int
    most: int | None


async def set_limit(session: AsyncSession, queue: str, most: int | None, actor: str | None) -> None:
    """Let at most so many jobs wait in the queue; None lets any number wait."""
    if most is None:
        await session.execute(sa.delete(depth_limit).where(depth_limit.c.queue == queue))
        return
    values = {"most": most, "actor": actor, "at": sa.func.now()}
    told = insert(depth_limit).values(queue=queue, **values)
    await session.execute(told.on_conflict_do_update(index_elements=["queue"], set_=values))


_DEPTHS = sa.text(
    """
    SELECT coalesce(waiting.queue, allowed.queue) AS queue, coalesce(queued, 0) AS queued, most
      FROM (SELECT queue, count(*) AS queued FROM bulwark.job WHERE state = 'queued' GROUP BY queue)
           AS waiting
      FULL JOIN bulwark.depth_limit AS allowed ON allowed.queue = waiting.queue
     ORDER BY 1
    """
)


async def read_depths(session: AsyncSession) -> list[Depth]:
    """Every queue in which jobs wait, or that has a limit."""
    return [Depth(**row) for row in (await session.execute(_DEPTHS)).mappings()]
