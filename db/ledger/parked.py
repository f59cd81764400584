"""Parked messages: what came through arq and could not be made a job, kept as it came."""

import hashlib
from collections.abc import Collection, Sequence
from datetime import timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import TIMESTAMP, insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

from db.ledger.job import SCHEMA


class Reason(StrEnum):
    """Why no job could be made of a message."""

    GONE = "gone"
    PICKLE = "pickle"
    UNREADABLE = "unreadable"
    UNKNOWN_JOB = "unknown_job"
    BAD_ARGUMENTS = "bad_arguments"
    TOO_LARGE = "too_large"
    UNSTORABLE = "unstorable"


parked = sa.Table(
    "parked",
    SQLModel.metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("queue", sa.Text, nullable=False),
    sa.Column("arq_id", sa.Text, nullable=False),
    sa.Column("kind", sa.Text),
    sa.Column("message", sa.LargeBinary),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("parked_at", TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
    sa.Column("job_id", sa.Uuid),
    sa.Index("uq_parked_arq_id_digest", "arq_id", "digest", unique=True),
    schema=SCHEMA,
)


async def park(
    session: AsyncSession,
    queue: str,
    arq_id: str,
    message: bytes | None,
    reason: Reason,
    kind: str | None,
) -> bool:
    """Keep a message as it came; false when it is there already, because it came twice."""
    new = await session.scalar(
        insert(parked)
        .values(
            queue=queue,
            arq_id=arq_id,
            kind=kind,
            message=message,
            digest=hashlib.sha256(message or b"").digest(),
            reason=reason,
        )
        .on_conflict_do_nothing(index_elements=[parked.c.arq_id, parked.c.digest])
        .returning(parked.c.id)
    )
    return new is not None


async def read_parked(
    session: AsyncSession, *, queue: str | None, most: int
) -> list[dict[str, Any]]:
    """The messages of which no job was made since, the newest first, without their content."""
    query = (
        sa.select(
            parked.c.id.label("number"),
            parked.c.arq_id,
            parked.c.queue,
            parked.c.kind,
            parked.c.reason,
            parked.c.parked_at,
            sa.func.length(parked.c.message).label("bytes"),
        )
        .where(parked.c.job_id.is_(None))
        .order_by(parked.c.id.desc())
        .limit(most)
    )
    if queue is not None:
        query = query.where(parked.c.queue == queue)
    return [dict(row) for row in (await session.execute(query)).mappings()]


async def take_parked(
    session: AsyncSession, parked_id: int
) -> sa.Row[str, str, bytes | None] | None:
    """Lock one parked message of which no job was made yet."""
    return (
        await session.execute(
            sa.select(parked.c.queue, parked.c.arq_id, parked.c.message)
            .where(parked.c.id == parked_id, parked.c.job_id.is_(None))
            .with_for_update()
        )
    ).one_or_none()


async def named(
    session: AsyncSession, kinds: Collection[str], queues: Collection[str], most: int
) -> list[int]:
    """The oldest messages of these queues that were parked though they name one of these kinds."""
    query = (
        sa.select(parked.c.id)
        .where(
            parked.c.reason == Reason.UNKNOWN_JOB,
            parked.c.job_id.is_(None),
            parked.c.kind.in_(kinds),
            parked.c.queue.in_(queues),
        )
        .order_by(parked.c.id)
        .limit(most)
    )
    return list(await session.scalars(query))


async def take_named(
    session: AsyncSession, numbers: Collection[int]
) -> Sequence[sa.Row[int, str, str, str, int]]:
    """Lock those of the messages that are still to be made jobs and that nobody else has locked.

    Of each its number, queue, id in arq, kind, and size in bytes.
    """
    size = sa.func.coalesce(sa.func.length(parked.c.message), 0, type_=sa.Integer)
    query = (
        sa.select(parked.c.id, parked.c.queue, parked.c.arq_id, parked.c.kind, size)
        .where(
            parked.c.id.in_(numbers),
            parked.c.reason == Reason.UNKNOWN_JOB,
            parked.c.job_id.is_(None),
        )
        .order_by(parked.c.id)
        .with_for_update(skip_locked=True)
    )
    return (await session.execute(query)).all()


async def content_of(session: AsyncSession, parked_id: int) -> bytes | None:
    """The message as it came; None where Redis had lost it already."""
    content: bytes | None = await session.scalar(
        sa.select(parked.c.message).where(parked.c.id == parked_id)
    )
    return content


async def leave(session: AsyncSession, parked_id: int, reason: Reason) -> None:
    """Say why still no job can be made of the message."""
    await session.execute(sa.update(parked).where(parked.c.id == parked_id).values(reason=reason))


async def settle(session: AsyncSession, parked_id: int, job_id: UUID) -> None:
    """Say which job was made of the message after all; the message stays."""
    await session.execute(sa.update(parked).where(parked.c.id == parked_id).values(job_id=job_id))


async def drop_old(session: AsyncSession, days: int, most: int) -> int:
    """Forget messages parked so long ago, a batch at a time. Returns how many went."""
    old = (
        sa.select(parked.c.id)
        .where(parked.c.parked_at < sa.func.now() - timedelta(days=days))
        .order_by(parked.c.id)
        .limit(most)
        .with_for_update(skip_locked=True)
    )
    gone = await session.execute(
        sa.delete(parked).where(parked.c.id.in_(old)).returning(parked.c.id)
    )
    return len(gone.all())
