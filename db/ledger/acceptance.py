"""Accepting jobs: their rows, unless more would wait in a queue than may."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP
from sqlalchemy.ext.asyncio import AsyncSession

from db.errors import QueueTooDeep
from db.ledger.job import RING_AGAIN, Ring

_COLUMNS = {
    "id": sa.Uuid,
    "kind": sa.Text,
    "payload": sa.Text,
    "queue": sa.Text,
    "priority": sa.SmallInteger,
    "max_attempts": sa.SmallInteger,
    "timeout_s": sa.Integer,
    "actor": sa.Text,
    "correlation_id": sa.Text,
}
_NAMES = ", ".join(_COLUMNS)
# What is refused is said by the statement that refuses it: a second look might find room again.
_INSERT = sa.text(
    f"""
    WITH given AS MATERIALIZED (
        SELECT * FROM unnest({", ".join(f":{name}" for name in _COLUMNS)}) AS given ({_NAMES})
    ), known AS MATERIALIZED (
        SELECT job.id, job.ring, job.kind, job.queue, job.priority, job.state
          FROM given JOIN bulwark.job USING (id)
    ), new AS MATERIALIZED (
        SELECT * FROM given WHERE NOT EXISTS (SELECT FROM known WHERE known.id = given.id)
    ), too_deep AS MATERIALIZED (
        SELECT * FROM (
            SELECT queue, allowed.most, jobs,
                   (SELECT count(*) FROM (SELECT FROM bulwark.job
                                           WHERE state = 'queued' AND queue = allowed.queue
                                           LIMIT allowed.most) AS queued) AS waiting
              FROM (SELECT queue, count(*) AS jobs FROM new GROUP BY queue) AS more
              JOIN bulwark.depth_limit AS allowed USING (queue)
             WHERE :heeds_depth) AS limited
         WHERE jobs + waiting > most
    ), written AS (
        INSERT INTO bulwark.job ({_NAMES}, run_at, ring, next_ring_at)
        SELECT {_NAMES.replace("payload", "payload::jsonb")}, due.at,
               CASE WHEN :rung AND due.at <= now() THEN 1 ELSE 0 END,
               CASE WHEN :rung AND due.at <= now() THEN now() + :again ELSE due.at END
          FROM new, (SELECT coalesce(:run_at, now())) AS due (at)
         WHERE NOT EXISTS (SELECT FROM too_deep)
         ORDER BY new.id
        ON CONFLICT (id) DO NOTHING
        RETURNING id, ring, kind, queue, priority
    ), rung AS (
        SELECT * FROM written
         UNION ALL
        SELECT id, ring, kind, queue, priority FROM known WHERE :rung AND state = 'queued'
    )
    SELECT id AS job_id, ring AS number, kind, queue, priority, NULL AS waiting, NULL AS most
      FROM rung
     UNION ALL
    SELECT NULL, NULL, NULL, queue, NULL, waiting, most FROM too_deep
    """
).bindparams(
    sa.bindparam("again", type_=sa.Interval),
    sa.bindparam("run_at", type_=TIMESTAMP(timezone=True)),
    sa.bindparam("rung", type_=sa.Boolean),
    sa.bindparam("heeds_depth", type_=sa.Boolean),
    *(sa.bindparam(name, type_=ARRAY(type_)) for name, type_ in _COLUMNS.items()),
)


async def insert_jobs(
    session: AsyncSession,
    rows: Sequence[Mapping[str, Any]],
    run_at: datetime | None,
    *,
    rung: bool,
    heeds_depth: bool = False,
) -> list[Ring]:
    """Write new jobs in one statement and return the rings that are due.

    Each row has an `id` made by the caller, and its payload as JSON text; a row whose id is
    already there is left as it is and rung again, as its ring may be lost with the answer to its
    COMMIT. When the caller has a bell (`rung`), the relay rings only what was not heard; otherwise
    it rings as soon as the job is due. Raises QueueTooDeep, with none written. Producers that ask
    at the same time do not see each other's jobs: a limit is exceeded by what they are just
    accepting.
    """
    values = {name: [row[name] for row in rows] for name in _COLUMNS}
    given = {"run_at": run_at, "rung": rung, "again": RING_AGAIN, "heeds_depth": heeds_depth}
    found = (await session.execute(_INSERT, values | given)).mappings().all()
    for one in found:
        if one["job_id"] is None:
            raise QueueTooDeep(one["queue"], one["waiting"], one["most"])
    names = ("job_id", "number", "kind", "queue", "priority")
    return [Ring(*(one[name] for name in names)) for one in found if one["number"] > 0]
