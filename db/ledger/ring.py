"""Which queued jobs are to be rung, when, and with what number."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger.job import CRASHES_BEFORE_SOLITUDE, ENDED, RING_AGAIN, Ring, State, job

RING_SLOWEST = timedelta(minutes=5)

_DUE_RINGS = sa.text(
    """
    UPDATE bulwark.job AS job
       SET ring = job.ring + 1,
           next_ring_at = now() + greatest(:again, least(now() - job.queued_at, :slowest))
      FROM (SELECT id FROM bulwark.job
             WHERE state = 'queued' AND next_ring_at <= now()
             ORDER BY next_ring_at LIMIT :most FOR UPDATE SKIP LOCKED) AS due
     WHERE job.id = due.id
    RETURNING job.id AS job_id, job.ring AS number, job.kind, job.queue, job.priority
    """
).bindparams(sa.bindparam("again", type_=sa.Interval), sa.bindparam("slowest", type_=sa.Interval))


async def due_rings(session: AsyncSession, most: int) -> list[Ring]:
    """Number the next ring of jobs that are due and unheard, and put off the one after.

    A job is rung again after RING_AGAIN, then at intervals that grow with its age, since a ring
    may be lost on the way.
    """
    rows = await session.execute(
        _DUE_RINGS, {"most": most, "again": RING_AGAIN, "slowest": RING_SLOWEST}
    )
    return [Ring(**row._mapping) for row in rows]


_SECONDS_TO_NEXT_RING = sa.text(  # asked every second: what is composed anew costs twice the CPU
    """
    SELECT extract(epoch FROM min(next_ring_at) - now())::float8 FROM bulwark.job
     WHERE state = 'queued'
    """
)


async def seconds_to_next_ring(session: AsyncSession) -> float | None:
    """How long until some queued job is due for a ring; None when none waits."""
    due_s: float | None = await session.scalar(_SECONDS_TO_NEXT_RING)
    return due_s


_IDS = sa.ARRAY(sa.Uuid)
"""One parameter, however many ids: PostgreSQL takes 32,767."""


async def ring_again(session: AsyncSession, job_ids: Collection[UUID]) -> None:
    """Make these jobs, if queued, due for a ring at their run time, since a ring was lost."""
    await session.execute(
        sa.update(job)
        .where(job.c.state == State.QUEUED, job.c.id == sa.any_(sa.literal([*job_ids], _IDS)))
        .values(next_ring_at=job.c.run_at)
    )


async def last_queued(session: AsyncSession) -> UUID | None:
    """The highest id of a queued job."""
    query = sa.select(job.c.id).where(job.c.state == State.QUEUED).order_by(job.c.id.desc())
    return await session.scalar(query.limit(1))


_RING_PAGE_AGAIN = sa.text(
    """
    WITH page AS (
        SELECT id FROM bulwark.job
         WHERE state = 'queued' AND id > :after AND id <= :last
         ORDER BY id LIMIT :most FOR NO KEY UPDATE SKIP LOCKED
    ), changed AS (
        UPDATE bulwark.job AS job SET next_ring_at = job.run_at
          FROM page WHERE job.id = page.id
    )
    SELECT count(*) OVER () AS jobs, id AS last FROM page ORDER BY id DESC LIMIT 1
    """
)


@dataclass(frozen=True)
class Page:
    """So many jobs, the last of them by id."""

    jobs: int
    last: UUID


async def ring_page_again(session: AsyncSession, after: UUID, last: UUID, most: int) -> Page | None:
    """Make queued jobs due for a ring at their run time: the first ones from `after` to `last`.

    One that is locked is passed over: who claims, cancels or rings it does more than a ring, and
    if that comes to nothing its next ring is due anyway. None when there is none left.
    """
    bounds = {"after": after, "last": last, "most": most}
    found = (await session.execute(_RING_PAGE_AGAIN, bounds)).one_or_none()
    return None if found is None else Page(found.jobs, found.last)


@dataclass(frozen=True)
class Queued:
    """A queued job's last ring; one that `is_rung` waits for nothing but to be heard."""

    ring: Ring
    is_rung: bool


_QUEUED_PAGE = sa.text(
    """
    SELECT id, ring, kind, queue, priority,
           ring > 0 AND run_at <= now() AND next_ring_at > now() AND crashes < :suspect
      FROM bulwark.job
     WHERE state = 'queued' AND id > :after
     ORDER BY id LIMIT :most
    """
)


async def queued_page(session: AsyncSession, after: UUID, most: int) -> list[Queued]:
    """The queued jobs that follow a job id, in the order of their ids."""
    rows = await session.execute(
        _QUEUED_PAGE, {"after": after, "most": most, "suspect": CRASHES_BEFORE_SOLITUDE}
    )
    return [Queued(Ring(*ring), is_rung) for *ring, is_rung in rows]


_STRANGE = sa.text(
    """
    SELECT mine.kind FROM unnest(:kinds) AS mine (kind)
     WHERE EXISTS (SELECT FROM bulwark.worker
                    WHERE ended_at IS NULL AND queues && :queues
                      AND NOT coalesce(mine.kind = ANY (kinds), false))
    """
).bindparams(
    sa.bindparam("kinds", type_=ARRAY(sa.Text)), sa.bindparam("queues", type_=ARRAY(sa.Text))
)


async def kinds_strange_to_others(
    session: AsyncSession, kinds: Sequence[str], queues: Sequence[str]
) -> list[str]:
    """Those of the kinds that some live worker on one of the queues has not said to know."""
    return list(await session.scalars(_STRANGE, {"kinds": kinds, "queues": queues}))


async def ended_among(session: AsyncSession, job_ids: Collection[UUID]) -> set[UUID]:
    """Which of these jobs have ended."""
    if not job_ids:
        return set()
    ended = await session.scalars(
        sa.select(job.c.id).where(job.c.id.in_(job_ids), job.c.state.in_(ENDED))
    )
    return set(ended)
