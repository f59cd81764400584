"""How a claim lets go of its job: the job has ended, or is put back into its queue."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db.errors import ClaimLost
from db.ledger.cancellation import cancellation
from db.ledger.job import SCHEMA, Claim, Reason, State, job
from db.ledger.limits import BRIEF, limit

_progress = sa.table("progress", sa.column("job_id", sa.Uuid), schema=SCHEMA)


async def ended_by(session: AsyncSession, held: Claim) -> State | None:
    """The state that this very claim left the job in; None if it is open or was taken back."""
    return await session.scalar(
        sa.select(job.c.state).where(
            job.c.id == held.job_id,
            job.c.claim_id == held.claim_id,
            job.c.state != State.RUNNING,
        )
    )


async def end(
    session: AsyncSession,
    held: Claim,
    state: State,
    *,
    reason: Reason | None = None,
    error: str | None = None,
    outcome: Mapping[str, Any] | None = None,
) -> None:
    """Write how the job ended. Raises ClaimLost when this claim no longer owns it."""
    await _leave_running(
        session,
        held,
        state=state,
        reason=reason,
        error=error,
        outcome=outcome,
        finished_at=sa.func.now(),
        attempt=job.c.attempt + (1 if state == State.FAILED else 0),
    )


async def requeue(
    session: AsyncSession,
    held: Claim,
    reason: Reason,
    *,
    delay: timedelta = timedelta(0),
    error: str | None = None,
    costs_attempt: bool = False,
) -> None:
    """Put the job back into its queue, due after `delay`; one that is cancelled is due at once.

    It has only to be ended then. Raises ClaimLost.
    """
    is_cancelled = sa.exists().where(cancellation.c.job_id == held.job_id)
    due = sa.case((is_cancelled, sa.func.now()), else_=sa.func.now() + delay)
    await _leave_running(
        session,
        held,
        state=State.QUEUED,
        reason=reason,
        error=error,
        run_at=due,
        queued_at=sa.func.now(),
        next_ring_at=due,
        attempt=job.c.attempt + (1 if costs_attempt else 0),
    )


async def _leave_running(session: AsyncSession, held: Claim, **values: Any) -> None:
    """Change the job's row, and forget how far the job was said to be."""
    await limit(session, BRIEF)
    forgotten = sa.delete(_progress).where(_progress.c.job_id == held.job_id).cte("forgotten")
    changed = await session.execute(
        sa.update(job)
        .where(
            job.c.id == held.job_id,
            job.c.claim_id == held.claim_id,
            job.c.state == State.RUNNING,
        )
        .values(**values)
        .returning(job.c.id)
        .add_cte(forgotten)
    )
    if changed.one_or_none() is None:
        raise ClaimLost
