"""Idempotency keys: the same key and payload lead to the first job, as long as the key is kept."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

from db.ledger.job import SCHEMA, job

idempotency = sa.Table(
    "idempotency",
    SQLModel.metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("job_id", sa.Uuid, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("expires_at", TIMESTAMP(timezone=True), nullable=False),
    sa.Index("ix_idempotency_expires_at", "expires_at"),
    schema=SCHEMA,
)


@dataclass(frozen=True)
class Key:
    """A key, the job that uses it first, and the digest of that job's payload."""

    key: str
    job_id: UUID
    digest: bytes


_KEEP = sa.text(
    """
    INSERT INTO bulwark.idempotency AS kept (key, job_id, digest, expires_at)
    SELECT new.key, new.job_id, new.digest, now() + :retention
      FROM unnest(:key, :job_id, :digest) AS new (key, job_id, digest)
     ORDER BY new.key
    ON CONFLICT (key) DO UPDATE
       SET job_id = excluded.job_id, digest = excluded.digest, expires_at = excluded.expires_at
     WHERE kept.expires_at <= now()
    """
).bindparams(
    sa.bindparam("retention", type_=sa.Interval),
    *(
        sa.bindparam(column.name, type_=ARRAY(column.type))
        for column in (idempotency.c.key, idempotency.c.job_id, idempotency.c.digest)
    ),
)
_KEPT = sa.text(
    "SELECT key, job_id, digest FROM bulwark.idempotency WHERE key = ANY (:key)"
).bindparams(sa.bindparam("key", type_=ARRAY(sa.Text)))


async def keep_keys(
    session: AsyncSession, wanted: Sequence[Key], retention: timedelta
) -> dict[str, Key]:
    """Take each key for its job, or say which job has it; an expired key is free again.

    Waits for a transaction that is just taking the same key, for as long as the caller lets it.
    The keys must differ.
    """
    columns = {name: [getattr(one, name) for one in wanted] for name in ("key", "job_id", "digest")}
    await session.execute(_KEEP, {**columns, "retention": retention})
    rows = await session.execute(_KEPT, {"key": columns["key"]})
    return {row.key: Key(*row) for row in rows}


_MAY_READ_PAYLOADS = sa.text("SELECT has_column_privilege('bulwark.job', 'payload', 'SELECT')")


async def jobs_behind(
    session: AsyncSession, keys: Collection[str]
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Kind and payload of the job that each key leads to, where the job is still kept.

    Empty for a role that may not read payloads.
    """
    if not await session.scalar(_MAY_READ_PAYLOADS):
        return {}
    rows = await session.execute(
        sa.select(idempotency.c.key, job.c.kind, job.c.payload)
        .join_from(idempotency, job, job.c.id == idempotency.c.job_id)
        .where(idempotency.c.key.in_(keys))
    )
    return {key: (kind, payload) for key, kind, payload in rows}


async def drop_expired(session: AsyncSession, most: int) -> int:
    """Forget expired keys, a batch at a time. Returns how many went."""
    expired = (
        sa.select(idempotency.c.key)
        .where(idempotency.c.expires_at <= sa.func.now())
        .limit(most)
        .with_for_update(skip_locked=True)
    )
    gone = await session.execute(
        sa.delete(idempotency).where(idempotency.c.key.in_(expired)).returning(idempotency.c.key)
    )
    return len(gone.all())
