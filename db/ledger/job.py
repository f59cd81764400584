"""The job table: what was accepted, who holds it, and how it ended.

States: queued → running → succeeded | failed | cancelled; running → queued. A trigger refuses every
other change.
"""

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

from db import columns  # noqa: F401 - sets the naming convention before the first constraint
from db.errors import Cancelled, ClaimLost
from db.ledger.limits import BRIEF, SET_LIMITS, Limits
from db.ledger.stored_json import JsonAsText, UnreadableJson

SCHEMA = "bulwark"
CRASHES_BEFORE_SOLITUDE = 2
PRIORITY_LIMIT = 9
RING_AGAIN = timedelta(seconds=10)


class State(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Reason(StrEnum):
    """Why a job failed or went back to the queue."""

    REJECTED = "rejected"
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"
    TIMED_OUT = "timed_out"
    POISONED = "poisoned"
    TOO_OLD = "too_old"
    RETRY = "retry"
    DEFERRED = "deferred"
    GIVEN_BACK = "given_back"
    RESCUED = "rescued"
    RETRIED = "retried"


ENDED = (State.SUCCEEDED, State.FAILED, State.CANCELLED)

_instant = TIMESTAMP(timezone=True)

job = sa.Table(
    "job",
    SQLModel.metadata,
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("payload", JSONB, nullable=False),
    sa.Column("queue", sa.Text, nullable=False, server_default="default"),
    sa.Column("priority", sa.SmallInteger, nullable=False, server_default="0"),
    sa.Column("state", sa.Text, nullable=False, server_default=State.QUEUED.value),
    sa.Column("reason", sa.Text),
    sa.Column("error", sa.Text),
    sa.Column("outcome", JSONB),
    sa.Column("run_at", _instant, nullable=False, server_default=sa.func.now()),
    sa.Column("attempt", sa.SmallInteger, nullable=False, server_default="0"),
    sa.Column("max_attempts", sa.SmallInteger, nullable=False),
    sa.Column("timeout_s", sa.Integer, nullable=False),
    sa.Column("actor", sa.Text),
    sa.Column("correlation_id", sa.Text),
    sa.Column("created_at", _instant, nullable=False, server_default=sa.func.now()),
    sa.Column("queued_at", _instant, nullable=False, server_default=sa.func.now()),
    sa.Column("started_at", _instant),
    sa.Column("finished_at", _instant),
    sa.Column("claim_id", sa.Uuid),
    sa.Column("worker_id", sa.Uuid),
    sa.Column("claimed_at", _instant),
    sa.Column("crashes", sa.SmallInteger, nullable=False, server_default="0"),
    sa.Column("ring", sa.Integer, nullable=False, server_default="0"),
    sa.Column("next_ring_at", _instant, server_default=sa.func.now()),
    sa.Column("arq_id", sa.Text),
    sa.Column("arq_enqueued_ms", sa.BigInteger),
    sa.CheckConstraint(
        "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="state"
    ),
    sa.CheckConstraint("priority BETWEEN -9 AND 9", name="priority"),
    sa.CheckConstraint("max_attempts >= 1 AND attempt >= 0", name="attempts"),
    sa.CheckConstraint("timeout_s >= 1", name="timeout"),
    sa.CheckConstraint(
        "state <> 'running' OR (claim_id IS NOT NULL AND worker_id IS NOT NULL)", name="claimed"
    ),
    sa.Index("ix_job_next_ring_at", "next_ring_at", postgresql_where=sa.text("state = 'queued'")),
    sa.Index("ix_job_worker_id", "worker_id", postgresql_where=sa.text("state = 'running'")),
    sa.Index("ix_job_state_id", "state", "id"),
    sa.Index(
        "uq_job_arq_id_arq_enqueued_ms",
        "arq_id",
        "arq_enqueued_ms",
        unique=True,
        postgresql_where=sa.text("arq_id IS NOT NULL"),
    ),
    schema=SCHEMA,
)


@dataclass(frozen=True)
class Claim:
    """One worker's hold on one job, from the claim to its end; `age_s` is since the first start.

    One that `is_cancelled` is there to be ended.
    """

    job_id: UUID
    claim_id: UUID
    worker_id: UUID
    kind: str
    payload: dict[str, Any] | UnreadableJson
    attempt: int
    max_attempts: int
    timeout_s: int
    actor: str | None
    correlation_id: str | None
    crashes: int
    age_s: float
    is_cancelled: bool = False


@dataclass(frozen=True)
class Ring:
    """What Redis is told about a job that is due: its id, and a number never used before for it."""

    job_id: UUID
    number: int
    kind: str
    queue: str
    priority: int


IS_CANCELLED = "EXISTS (SELECT FROM bulwark.cancellation AS c WHERE c.job_id = job.id)"
_CLAIM = sa.text(
    f"""
    WITH limits AS MATERIALIZED (
        {SET_LIMITS}, set_config('synchronous_commit', 'off', true)
    ), me AS (
        SELECT worker.id FROM limits, bulwark.worker
         WHERE worker.id = :worker_id AND worker.ended_at IS NULL FOR KEY SHARE OF worker
    )
    UPDATE bulwark.job AS job
       SET state = 'running', reason = NULL, claim_id = :claim_id, worker_id = me.id,
           claimed_at = CASE job.state WHEN 'running' THEN job.claimed_at ELSE now() END,
           started_at = coalesce(job.started_at, now()), next_ring_at = NULL
      FROM me
     WHERE job.id = :job_id
       AND (job.state = 'queued' AND job.run_at <= now() AND (job.crashes < :suspect OR :alone)
            OR job.state = 'running' AND job.claim_id = :claim_id)
    RETURNING job.id AS job_id, job.claim_id, job.worker_id, job.kind, job.payload::text AS payload,
              job.attempt, job.max_attempts, job.timeout_s, job.actor, job.correlation_id,
              job.crashes, extract(epoch FROM job.claimed_at - job.started_at)::float8 AS age_s,
              {IS_CANCELLED} AS is_cancelled
    """
).columns(payload=JsonAsText)


async def claim(
    session: AsyncSession, job_id: UUID, claim_id: UUID, worker_id: UUID, *, alone: bool = False
) -> Claim | None:
    """Take a queued, due job for a live worker; None when it is not to be had.

    Running it again with the same claim_id, after a lost answer, returns the same claim.
    A job that was present at several crashes is given only to a worker that runs it alone.
    The commit does not wait for the disk: should PostgreSQL crash and forget the claim, the fence
    of whatever follows fails, and what follows and is kept makes the claim last, too.
    """
    row = (
        await session.execute(
            _CLAIM,
            {
                "job_id": job_id,
                "claim_id": claim_id,
                "worker_id": worker_id,
                "suspect": CRASHES_BEFORE_SOLITUDE,
                "alone": alone,
                **BRIEF.parameters,
            },
        )
    ).one_or_none()
    return None if row is None else Claim(**row._mapping)


async def waits_for_solitude(session: AsyncSession, job_id: UUID) -> bool:
    """Tell whether a claim failed only because the job must run alone."""
    return bool(
        await session.scalar(
            sa.select(job.c.id).where(
                job.c.id == job_id,
                job.c.state == State.QUEUED,
                job.c.run_at <= sa.func.now(),
                job.c.crashes >= CRASHES_BEFORE_SOLITUDE,
            )
        )
    )


_FENCE = sa.text(
    f"""
    WITH limits AS MATERIALIZED ({SET_LIMITS})
    SELECT {IS_CANCELLED} FROM limits, bulwark.job AS job
     WHERE job.id = :job_id AND job.claim_id = :claim_id AND job.state = 'running'
       FOR SHARE OF job
    """
)


async def fence(session: AsyncSession, held: Claim, limits: Limits | None = None) -> None:
    """Prove that this claim still owns the job, and keep it so until the transaction ends.

    Everything the transaction does commits only if the claim is still the current one. Without
    limits, a statement and a pause may take as long as the job itself.
    Raises ClaimLost when the job was taken back, and Cancelled, unless the claim knows it, when it
    is to go no further; the caller's transaction must then roll back.
    """
    limits = limits or Limits(statement_s=held.timeout_s, idle_s=held.timeout_s)
    row = await session.execute(
        _FENCE,
        {"job_id": held.job_id, "claim_id": held.claim_id, **limits.parameters},
    )
    is_cancelled = row.scalar_one_or_none()
    if is_cancelled is None:
        raise ClaimLost
    if is_cancelled and not held.is_cancelled:
        raise Cancelled
