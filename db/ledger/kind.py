"""The kinds of jobs that workers know, with their declared terms: what SQL enqueues by."""

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

from db.ledger.job import SCHEMA

CHANNEL = "bulwark_jobs"
"""Where `bulwark.enqueue` notifies of a job that is due, or will be soon."""

kind = sa.Table(
    "kind",
    SQLModel.metadata,
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("queue", sa.Text, nullable=False),
    sa.Column("priority", sa.SmallInteger, nullable=False),
    sa.Column("max_attempts", sa.SmallInteger, nullable=False),
    sa.Column("timeout_s", sa.Integer, nullable=False),
    sa.Column("payload_defaults", JSONB, nullable=False),
    sa.Column(
        "declared_at", TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()
    ),
    schema=SCHEMA,
)
_DECLARED = ("kind", "queue", "priority", "max_attempts", "timeout_s", "payload_defaults")
_PUBLISH = sa.text(
    """
    WITH declared AS MATERIALIZED (
        SELECT kind, queue, priority, max_attempts, timeout_s, payload_defaults::jsonb
          FROM unnest(:kind, :queue, :priority, :max_attempts, :timeout_s, :payload_defaults)
               AS declared (kind, queue, priority, max_attempts, timeout_s, payload_defaults)
    )
    INSERT INTO bulwark.kind AS known
           (kind, queue, priority, max_attempts, timeout_s, payload_defaults)
    SELECT * FROM declared
     WHERE (kind, queue, priority, max_attempts, timeout_s, payload_defaults) NOT IN (
           SELECT kind, queue, priority, max_attempts, timeout_s, payload_defaults
             FROM bulwark.kind)
     ORDER BY kind
    ON CONFLICT (kind) DO UPDATE
       SET queue = excluded.queue, priority = excluded.priority,
           max_attempts = excluded.max_attempts, timeout_s = excluded.timeout_s,
           payload_defaults = excluded.payload_defaults, declared_at = now()
    """
).bindparams(
    *(
        sa.bindparam(
            name, type_=ARRAY(sa.Text if name == "payload_defaults" else kind.c[name].type)
        )
        for name in _DECLARED
    )
)


async def publish_kinds(session: AsyncSession, declared: Sequence[Mapping[str, Any]]) -> None:
    """Let SQL know of these kinds; one that is known by the same terms is not written again.

    Each row has the columns of the table, its payload_defaults as JSON text.
    """
    if declared:
        await session.execute(
            _PUBLISH, {name: [one[name] for one in declared] for name in _DECLARED}
        )
