"""Dead letters: jobs that have failed for good, or were cancelled, and running them once more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger import cancellation
from db.ledger.chunk import REST
from db.ledger.job import Reason, State, job
from db.ledger.verdict import WITHOUT_EFFECT


@dataclass(frozen=True)
class Choice:
    """Which failed jobs are meant: those that meet all that is given; times are of their end."""

    kind: str | None = None
    reason: Reason | None = None
    queue: str | None = None
    since: datetime | None = None

    @property
    def conditions(self) -> list[sa.ColumnElement[bool]]:
        asked: Mapping[str, sa.ColumnElement[bool] | None] = {
            "kind": None if self.kind is None else job.c.kind == self.kind,
            "reason": None if self.reason is None else job.c.reason == self.reason,
            "queue": None if self.queue is None else job.c.queue == self.queue,
            "since": None if self.since is None else job.c.finished_at >= self.since,
        }
        return [
            job.c.state == State.FAILED,
            *(one for one in asked.values() if one is not None),
        ]


async def read_failed(session: AsyncSession, choice: Choice, most: int) -> list[dict[str, Any]]:
    """The failed jobs, the newest first."""
    query = (
        sa.select(
            job.c.id.label("job_id"),
            job.c.kind,
            job.c.queue,
            job.c.reason,
            job.c.error,
            job.c.attempt,
            job.c.max_attempts,
            job.c.crashes,
            job.c.actor,
            job.c.created_at,
            job.c.finished_at,
        )
        .where(*choice.conditions)
        .order_by(job.c.id.desc())
        .limit(most)
    )
    return [dict(row) for row in (await session.execute(query)).mappings()]


async def count_failed(session: AsyncSession, choice: Choice) -> list[dict[str, Any]]:
    """How many there are of each kind and reason, the most first."""
    jobs = sa.func.count().label("jobs")
    query = (
        sa.select(job.c.kind, job.c.reason, jobs)
        .where(*choice.conditions)
        .group_by(job.c.kind, job.c.reason)
        .order_by(jobs.desc(), job.c.kind, job.c.reason)
    )
    return [dict(row) for row in (await session.execute(query)).mappings()]


async def choose_failed(session: AsyncSession, choice: Choice) -> list[UUID]:
    """The ids of them all, in the order of their acceptance."""
    query = sa.select(job.c.id).where(*choice.conditions).order_by(job.c.id)
    return list(await session.scalars(query))


# A chunk that nothing came of, counted from the end of the job backwards: its rows are judged
# anew. One that has changed something stays, and all that stand before it; so does one of a job
# that does not count what became of its rows, since nobody can tell. What closes an input counts
# only rows that were not reached, and there may be none: the end of a file can be blank.
_FORGET_CHUNKS = sa.text(
    """
    WITH effective AS (
        SELECT chunk.job_id, max(chunk.chunk_no) AS last FROM bulwark.chunk AS chunk
         WHERE chunk.job_id = ANY (:job_ids) AND chunk.chunk_no > 0
           AND (chunk.counts - :without_effect <> '{}'
                OR chunk.rows = 0 AND NOT coalesce(chunk.detail ? :rest, false)
                OR chunk.rows - chunk.filtered > (
                       SELECT coalesce(sum(CAST(rows AS bigint)), 0)
                         FROM jsonb_each_text(chunk.counts) AS counted(verdict, rows))
                OR EXISTS (SELECT FROM bulwark.audit AS entry
                            WHERE entry.job_id = chunk.job_id
                              AND entry.chunk_no = chunk.chunk_no))
         GROUP BY chunk.job_id
    ), forgotten AS (
        DELETE FROM bulwark.chunk AS chunk
         WHERE chunk.job_id = ANY (:job_ids) AND chunk.chunk_no > 0
           AND chunk.chunk_no > coalesce(
               (SELECT last FROM effective WHERE effective.job_id = chunk.job_id), 0)
        RETURNING chunk.job_id, chunk.chunk_no
    )
    DELETE FROM bulwark.verdict AS verdict USING forgotten
     WHERE verdict.job_id = forgotten.job_id AND verdict.chunk_no = forgotten.chunk_no
    """
).bindparams(
    sa.bindparam("job_ids", type_=ARRAY(sa.Uuid)),
    sa.bindparam("without_effect", type_=ARRAY(sa.Text)),
)
_FORGET_REFUSED_ROWS = sa.text(
    "DELETE FROM bulwark.verdict WHERE job_id = ANY (:job_ids) AND chunk_no = 0"
).bindparams(sa.bindparam("job_ids", type_=ARRAY(sa.Uuid)))


async def retry(session: AsyncSession, job_ids: Sequence[UUID]) -> list[UUID]:
    """Put those of the jobs that failed or were cancelled back into their queues, as if new.

    They keep their ids and what they have committed, and go on behind that; rows that were judged
    without any effect behind it, or not reached, are judged anew. Returns those that are queued
    now; the relay rings them.
    """
    rows = await session.scalars(
        sa.select(job.c.id)
        .where(job.c.id.in_(job_ids), job.c.state.in_((State.FAILED, State.CANCELLED)))
        .order_by(job.c.id)
        .with_for_update()
    )
    ids = list(rows)
    if not ids:
        return []
    without_effect = sorted(map(str, WITHOUT_EFFECT))
    await session.execute(
        _FORGET_CHUNKS, {"job_ids": ids, "without_effect": without_effect, "rest": REST}
    )
    await session.execute(_FORGET_REFUSED_ROWS, {"job_ids": ids})
    await cancellation.forget(session, ids)
    now = sa.func.now()
    await session.execute(
        sa.update(job)
        .where(job.c.id.in_(ids))
        .values(
            state=State.QUEUED,
            reason=Reason.RETRIED,
            outcome=None,
            attempt=0,
            crashes=0,
            claim_id=None,
            run_at=now,
            queued_at=now,
            next_ring_at=now,
            started_at=None,
            finished_at=None,
        )
    )
    return ids
