"""Jobs made of messages that plain arq clients enqueued: one job for each message."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger.job import job

_FIRST_COME = [job.c.arq_id, job.c.arq_enqueued_ms]


async def adopt(session: AsyncSession, row: Mapping[str, Any], ring_after: timedelta) -> UUID:
    """Write the job of a message and return its id; a message that comes again has its job already.

    A message is known by its arq id and the time at which it was enqueued, since arq lets a client
    use an id again. The relay rings the job when nobody has taken it after `ring_after`.
    """
    adopted: UUID | None = await session.scalar(
        insert(job)
        .values(**row, next_ring_at=sa.func.now() + ring_after)
        .on_conflict_do_nothing(
            index_elements=_FIRST_COME, index_where=sa.text("arq_id IS NOT NULL")
        )
        .returning(job.c.id)
    )
    return adopted or await _job_of(session, row)


async def _job_of(session: AsyncSession, row: Mapping[str, Any]) -> UUID:
    query = sa.select(job.c.id).where(*(column == row[column.name] for column in _FIRST_COME))
    found: UUID = (await session.scalars(query)).one()
    return found
