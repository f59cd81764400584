"""Cancellations: which jobs are to go no further, told beside the job's row.

A job's own transactions keep its row locked; a request of its own row waits for none of them.
"""

from collections.abc import Collection
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import TIMESTAMP, insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

from db.errors import Cancelled
from db.ledger.chunk import chunk
from db.ledger.job import SCHEMA, Claim, State, job

cancellation = sa.Table(
    "cancellation",
    SQLModel.metadata,
    sa.Column("job_id", sa.Uuid, primary_key=True),
    sa.Column("at_once", sa.Boolean, nullable=False),
    sa.Column("actor", sa.Text),
    sa.Column("at", TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
    schema=SCHEMA,
)


async def cancel(session: AsyncSession, job_id: UUID, actor: str | None, *, at_once: bool) -> State:
    """Let the job go no further.

    One that waits and has committed nothing ends here. Any other is ended by a worker, which
    counts what was not reached: a running one at its next chunk or, `at_once`, wherever it is; one
    that waits for another run as soon as it is claimed. Repeating it changes nothing, but for
    `at_once`. Returns where the job, which must be there, stands now.
    """
    asked = insert(cancellation).values(job_id=job_id, at_once=at_once, actor=actor)
    await session.execute(
        asked.on_conflict_do_update(
            index_elements=["job_id"], set_={"at_once": cancellation.c.at_once | at_once}
        )
    )
    waits = (job.c.id == job_id, job.c.state == State.QUEUED)
    await session.execute(sa.select(job.c.id).where(*waits).with_for_update())
    # Only a statement that begins under the lock sees every chunk that there is.
    untouched = ~sa.exists().where(chunk.c.job_id == job_id)
    ended = await session.execute(
        sa.update(job)
        .where(*waits, untouched)
        .values(state=State.CANCELLED, finished_at=sa.func.now(), error=_said_by(actor))
        .returning(job.c.id)
    )
    if ended.one_or_none() is None:
        due = {"run_at": sa.func.now(), "next_ring_at": sa.func.now()}
        await session.execute(sa.update(job).where(*waits).values(due))
    state = sa.select(job.c.state).where(job.c.id == job_id)
    return State((await session.execute(state)).scalar_one())


def _said_by(actor: str | None) -> str:
    return "cancelled" if actor is None else f"cancelled by {actor}"


async def read_reason(session: AsyncSession, job_id: UUID) -> str:
    """Who has cancelled the job, in words for its row."""
    actor = await session.scalar(
        sa.select(cancellation.c.actor).where(cancellation.c.job_id == job_id)
    )
    return _said_by(actor)


async def heed(session: AsyncSession, held: Claim) -> None:
    """Raise Cancelled when the job is to go no further, unless the claim knows it."""
    asked = sa.select(sa.exists().where(cancellation.c.job_id == held.job_id))
    if not held.is_cancelled and await session.scalar(asked):
        raise Cancelled


async def cancelled_at_once(session: AsyncSession, claim_ids: Collection[UUID]) -> list[UUID]:
    """Those of the claims whose jobs are to stop wherever they are."""
    return list(
        await session.scalars(
            sa.select(job.c.claim_id)
            .join(cancellation, cancellation.c.job_id == job.c.id)
            .where(
                cancellation.c.at_once,
                job.c.state == State.RUNNING,
                job.c.claim_id.in_(claim_ids),
            )
        )
    )


async def forget(session: AsyncSession, job_ids: Collection[UUID]) -> None:
    """Let the jobs go on when they are run again."""
    await session.execute(sa.delete(cancellation).where(cancellation.c.job_id.in_(job_ids)))


_PUT_OFF = sa.text(
    """
    UPDATE bulwark.job SET run_at = now(), next_ring_at = now() WHERE id IN (
        SELECT j.id FROM bulwark.cancellation AS c
          JOIN bulwark.job AS j ON j.id = c.job_id
         WHERE j.state = 'queued' AND j.run_at > now()
         LIMIT :most FOR UPDATE OF j SKIP LOCKED)
    RETURNING id
    """
)


async def make_due(session: AsyncSession, most: int) -> int:
    """Have jobs ended now that are cancelled and yet put off, a batch at a time; returns how many.

    A worker that puts a job off while `cancel` has not committed does not see its row, nor does
    `cancel` then see that the job is queued again: only who comes later sees both.
    """
    return len((await session.execute(_PUT_OFF, {"most": most})).all())


_OBSOLETE = sa.text(
    """
    DELETE FROM bulwark.cancellation WHERE job_id IN (
        SELECT c.job_id FROM bulwark.cancellation AS c
          LEFT JOIN bulwark.job AS j ON j.id = c.job_id
         WHERE j.state IS NULL OR j.state NOT IN ('queued', 'running')
         LIMIT :most FOR UPDATE OF c SKIP LOCKED)
    RETURNING job_id
    """
)


async def drop_obsolete(session: AsyncSession, most: int) -> int:
    """Forget those of jobs that have ended, a batch at a time. Returns how many went."""
    return len((await session.execute(_OBSOLETE, {"most": most})).all())
