"""The worker table: which processes are alive, and which claims each says it holds."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP, insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

from db.ledger.job import SCHEMA

APPLICATION_NAME = "bulwark {worker_id}"
"""How the names of a worker's connections begin, so that a lost worker's backends can be found.

PgBouncer's `application_name_add_host` writes an address behind it.
"""
KEPT = timedelta(days=7)
"""How long the row of a worker that has ended is kept."""

_instant = TIMESTAMP(timezone=True)

worker = sa.Table(
    "worker",
    SQLModel.metadata,
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("queues", ARRAY(sa.Text), nullable=False),
    sa.Column("started_at", _instant, nullable=False, server_default=sa.func.now()),
    sa.Column("seen_at", _instant, nullable=False, server_default=sa.func.now()),
    sa.Column("previous_seen_at", _instant, nullable=False, server_default=sa.func.now()),
    sa.Column("claims", ARRAY(sa.Uuid), nullable=False, server_default="{}"),
    sa.Column("previous_claims", ARRAY(sa.Uuid), nullable=False, server_default="{}"),
    sa.Column("ended_at", _instant),
    sa.Column("end_reason", sa.Text),
    sa.Column("kinds", ARRAY(sa.Text)),
    sa.Index("ix_worker_seen_at", "seen_at", postgresql_where=sa.text("ended_at IS NULL")),
    schema=SCHEMA,
)


@dataclass(frozen=True)
class LostWorker:
    """A worker that has not been seen for longer than it may."""

    id: UUID
    host: str
    pid: int
    seen_at: datetime


async def register(
    session: AsyncSession,
    worker_id: UUID,
    host: str,
    pid: int,
    queues: Sequence[str],
    kinds: Collection[str] | None = None,
) -> None:
    """Make a worker's row, new at every start; repeating it changes nothing.

    Of one that does not say which kinds of jobs it knows, as before that column was there, others
    expect that it may know none.
    """
    await session.execute(
        insert(worker)
        .values(
            id=worker_id,
            host=host,
            pid=pid,
            queues=list(queues),
            kinds=None if kinds is None else sorted(kinds),
        )
        .on_conflict_do_nothing()
    )


_BEAT = sa.text(
    """
    UPDATE bulwark.worker
       SET previous_seen_at = seen_at, previous_claims = claims, seen_at = clock_timestamp(),
           claims = :claims
     WHERE id = :id AND ended_at IS NULL
    RETURNING id
    """
).bindparams(sa.bindparam("claims", type_=ARRAY(sa.Uuid)))


async def beat(session: AsyncSession, worker_id: UUID, claims: Collection[UUID]) -> bool:
    """Say that the worker lives and which claims it holds; false when it was declared lost."""
    seen = await session.execute(_BEAT, {"id": worker_id, "claims": list(claims)})
    return seen.one_or_none() is not None


async def deregister(session: AsyncSession, worker_id: UUID) -> None:
    """Mark a worker as stopped; it can claim nothing any more."""
    await session.execute(
        sa.update(worker)
        .where(worker.c.id == worker_id, worker.c.ended_at.is_(None))
        .values(ended_at=sa.func.now(), end_reason="stopped")
    )


async def silent_workers(session: AsyncSession, after: timedelta) -> list[LostWorker]:
    """The workers not seen for longer than `after`, by PostgreSQL's clock."""
    rows = await session.execute(
        sa.select(worker.c.id, worker.c.host, worker.c.pid, worker.c.seen_at)
        .where(worker.c.ended_at.is_(None), worker.c.seen_at < sa.func.now() - after)
        .order_by(worker.c.seen_at)
    )
    return [LostWorker(*row) for row in rows]


UNFINISHED = """
    SELECT w.id FROM bulwark.worker AS w
     WHERE w.ended_at IS NOT NULL
       AND (EXISTS (SELECT FROM bulwark.job AS j WHERE j.worker_id = w.id AND j.state = 'running')
            OR w.end_reason = 'lost'
               AND EXISTS (SELECT FROM pg_stat_activity
                            WHERE starts_with(application_name,
                                              replace(:name, '{worker_id}', w.id::text))))
"""
_UNFINISHED = sa.text(UNFINISHED).bindparams(name=APPLICATION_NAME)


async def unfinished_losses(session: AsyncSession) -> list[UUID]:
    """Ended workers that still hold jobs, and lost ones that still have backends.

    A backend of a lost worker may hold a lock that has nothing to do with a job it had claimed.
    """
    return list((await session.execute(_UNFINISHED)).scalars())


async def mark_lost(session: AsyncSession, worker_id: UUID, after: timedelta) -> bool:
    """Declare a worker lost unless it has beaten meanwhile; from then on it can claim nothing.

    Waits for a claim that is just being made, because the claim locks the worker's row.
    """
    silent = await session.scalar(
        sa.select(worker.c.id)
        .where(
            worker.c.id == worker_id,
            worker.c.ended_at.is_(None),
            worker.c.seen_at < sa.func.now() - after,
        )
        .with_for_update()
    )
    if silent is None:
        return False
    await session.execute(
        sa.update(worker)
        .where(worker.c.id == worker_id)
        .values(ended_at=sa.func.now(), end_reason="lost")
    )
    return True


_TERMINATE = sa.text(
    """
    SELECT count(*) FROM (
        SELECT pg_terminate_backend(pid) FROM pg_stat_activity
         WHERE starts_with(application_name, :name) AND pid <> pg_backend_pid()
           AND EXISTS (SELECT FROM bulwark.worker
                        WHERE id = :id
                          AND (ended_at IS NOT NULL OR seen_at < now() - :after))) AS told
    """
).bindparams(sa.bindparam("after", type_=sa.Interval))


async def terminate_backends(session: AsyncSession, worker_id: UUID, after: timedelta) -> int:
    """Send away the backends of a worker that has ended, or was not seen for longer than `after`.

    Returns how many there still were. A client that stands still inside COPY, or between the parts
    of a statement (Parse and Bind), holds its locks for ever: there neither a timeout of
    PostgreSQL's counts nor a cancel. Needs the same role or pg_signal_backend.
    """
    terms = {"name": APPLICATION_NAME.format(worker_id=worker_id), "id": worker_id, "after": after}
    told: int = (await session.execute(_TERMINATE, terms)).scalar_one()
    return told


_DROP_ENDED = sa.text(
    """
    DELETE FROM bulwark.worker WHERE id IN (
        SELECT w.id FROM bulwark.worker AS w
         WHERE w.ended_at < now() - :kept
           AND NOT EXISTS (SELECT FROM bulwark.job
                            WHERE worker_id = w.id AND state = 'running')
         LIMIT :most FOR UPDATE SKIP LOCKED)
    RETURNING id
    """
).bindparams(sa.bindparam("kept", type_=sa.Interval))


async def drop_ended(session: AsyncSession, most: int) -> int:
    """Delete rows of workers that ended long ago and hold no job, a batch at a time.

    Returns how many went.
    """
    gone = await session.execute(_DROP_ENDED, {"kept": KEPT, "most": most})
    return len(gone.all())


_SERVER_AGE = sa.text(
    "SELECT extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())::float8"
)


async def server_age_s(session: AsyncSession) -> float:
    """Seconds since PostgreSQL started, by its own clock."""
    age_s: float = (await session.execute(_SERVER_AGE)).scalar_one()
    return age_s
