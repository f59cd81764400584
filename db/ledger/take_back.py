"""Taking jobs back from workers that died or forgot them: a lost claim commits nothing more."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger.worker import APPLICATION_NAME, UNFINISHED

CRASHES_BEFORE_POISONED = 3

_TAKE_BACK = """
    WITH taken AS (
    UPDATE bulwark.job AS job
       SET state = CASE WHEN verdict.crashes >= :poisoned THEN 'failed' ELSE 'queued' END,
           reason = CASE WHEN verdict.crashes >= :poisoned THEN 'poisoned' ELSE 'rescued' END,
           error = CASE WHEN verdict.crashes >= :poisoned THEN :poisoned_text END,
           finished_at = CASE WHEN verdict.crashes >= :poisoned THEN now() END,
           claim_id = NULL, crashes = verdict.crashes, queued_at = now(), next_ring_at = now()
      FROM (
        SELECT held.id, held.claim_id,
               CASE WHEN EXISTS (SELECT FROM bulwark.chunk
                                  WHERE job_id = held.id AND claim_id = held.claim_id
                                    AND chunk_no > 0)
                    THEN 0 ELSE held.crashes + CASE w.end_reason WHEN 'lost' THEN 1 ELSE 0 END
               END AS crashes
          FROM bulwark.job AS held JOIN bulwark.worker AS w ON w.id = held.worker_id
         WHERE held.state = 'running' AND {condition} {locking}
      ) AS verdict
     WHERE job.id = verdict.id AND job.claim_id = verdict.claim_id AND job.state = 'running'
    RETURNING job.id AS job_id, verdict.claim_id, job.kind, job.state, job.crashes
    ), forgotten AS (
    DELETE FROM bulwark.progress WHERE job_id IN (SELECT job_id FROM taken)
    )
    SELECT * FROM taken
"""
_TAKE_BACK_FROM = sa.text(_TAKE_BACK.format(condition="w.id = :worker_id", locking=""))
_FORGOTTEN = """w.ended_at IS NULL AND held.claimed_at < w.previous_seen_at
           AND held.claim_id <> ALL (w.claims) AND held.claim_id <> ALL (w.previous_claims)"""
_TAKE_BACK_FORGOTTEN = sa.text(
    _TAKE_BACK.format(condition=_FORGOTTEN, locking="FOR UPDATE OF held SKIP LOCKED")
)
_AMISS = sa.text(
    f"""
    SELECT EXISTS (SELECT FROM bulwark.worker
                    WHERE ended_at IS NULL AND seen_at < now() - :lost_after)
        OR EXISTS ({UNFINISHED})
        OR EXISTS (SELECT FROM bulwark.job AS held JOIN bulwark.worker AS w ON w.id = held.worker_id
                    WHERE held.state = 'running' AND {_FORGOTTEN})
    """
).bindparams(sa.bindparam("lost_after", type_=sa.Interval), name=APPLICATION_NAME)
_POISONED_TEXT = (
    f"the worker died {CRASHES_BEFORE_POISONED} times while it ran this job, without progress; "
    "find out why before it is run again"
)


@dataclass(frozen=True)
class TakenBack:
    """A job that a lost worker held; state is queued again, or failed when it is poisoned."""

    job_id: UUID
    claim_id: UUID
    kind: str
    state: str
    crashes: int


async def is_anything_amiss(session: AsyncSession, lost_after: timedelta) -> bool:
    """Whether some worker is silent, has left something behind, or has forgotten a job."""
    amiss: bool = (await session.execute(_AMISS, {"lost_after": lost_after})).scalar_one()
    return amiss


async def from_worker(session: AsyncSession, worker_id: UUID) -> list[TakenBack]:
    """Take back all that an ended worker held.

    Costs no attempt. A crash counts only when the worker was lost, not stopped, and the claim had
    committed no chunk of rows, so that the deaths of its workers never poison a job that gets on.
    """
    return await _take_back(session, _TAKE_BACK_FROM, worker_id=worker_id)


async def forgotten(session: AsyncSession) -> list[TakenBack]:
    """Take back jobs whose live worker beat twice without naming their claim.

    A job with a transaction still open is left for the next time, so that it delays no other.
    """
    return await _take_back(session, _TAKE_BACK_FORGOTTEN)


async def _take_back(
    session: AsyncSession, statement: sa.TextClause, **parameters: Any
) -> list[TakenBack]:
    rows = await session.execute(
        statement,
        {
            **parameters,
            "poisoned": CRASHES_BEFORE_POISONED,
            "poisoned_text": _POISONED_TEXT,
        },
    )
    return [TakenBack(**row._mapping) for row in rows]
