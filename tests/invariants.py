"""What must hold of a database once all its jobs have ended, whatever died on the way."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import asyncpg

from tests.stage import connected

_BULK = "('insert_rows', 'update_rows', 'soft_delete_rows', 'restore_rows', 'transfer_window')"
_SINGLE = "('transfer_heroes', 'swap_heroes')"
_EFFECTS = "ARRAY['inserted', 'updated', 'revived', 'deleted', 'restored', 'moved']"
_DIFFERENCE = (
    "greatest({wanted} - ({found}), 0)::int AS lost, greatest({found} - ({wanted}), 0)::int"
)

# Each gives what is wrong, and how many effects are lost and doubled by it.

_NOT_ENDED = """
    SELECT format('job %s (%s) is still %s, %s', id, kind, state, coalesce(reason, 'as accepted')),
           1 AS lost, 0 AS doubled
      FROM bulwark.job
     WHERE state NOT IN ('succeeded', 'failed', 'cancelled') OR finished_at IS NULL
"""
_RECEIPTS = f"""
    SELECT format('chunk %s of job %s has %s rows and %s verdicts', chunk_no, job_id, given, told),
           {_DIFFERENCE.format(wanted="given", found="told")}
      FROM bulwark.chunk, LATERAL (
               SELECT rows - filtered, coalesce(sum(value::bigint), 0)
                 FROM jsonb_each_text(counts)
           ) AS verdicts (given, told)
     WHERE chunk_no > 0 AND given <> told
"""
_GAPS = f"""
    SELECT format('job %s has a chunk that ends with row %s, and the next begins with row %s',
                  job_id, ends, next_row),
           {_DIFFERENCE.format(wanted="next_row", found="ends + 1")}
      FROM (SELECT job_id, first_row + rows - 1 AS ends,
                   lead(first_row) OVER (PARTITION BY job_id ORDER BY chunk_no) AS next_row
              FROM bulwark.chunk JOIN bulwark.job ON job.id = job_id
             WHERE chunk_no > 0 AND kind IN {_BULK}) AS spans
     WHERE next_row <> ends + 1
"""
_UNJUDGED = f"""
    SELECT format('job %s (%s) has %s, and its receipts end at byte %s of %s',
                  id, kind, state, reached, (opening.detail ->> 'text_bytes')::bigint),
           1 AS lost, 0 AS doubled
      FROM bulwark.job JOIN bulwark.chunk AS opening ON opening.job_id = id AND chunk_no = 0,
           LATERAL (SELECT max(end_byte) AS reached FROM bulwark.chunk WHERE job_id = id) AS read
     WHERE state IN ('failed', 'cancelled') AND reason IS DISTINCT FROM 'poisoned'
       AND kind IN {_BULK} AND reached < (opening.detail ->> 'text_bytes')::bigint
"""
_OUTCOMES = f"""
    SELECT format('job %s says %s, and its receipts say %s of %s rows',
                  id, outcome, told, done.rows), 0 AS lost, 0 AS doubled
      FROM bulwark.job, LATERAL (
               SELECT coalesce(sum(rows), 0) AS rows FROM bulwark.chunk WHERE job_id = id
           ) AS done, LATERAL (
               SELECT coalesce(jsonb_object_agg(key, total), '{{}}') AS told
                 FROM (SELECT key, sum(value::bigint) AS total
                         FROM bulwark.chunk, jsonb_each_text(counts)
                        WHERE job_id = id GROUP BY key) AS totals
           ) AS verdicts
     WHERE kind IN {_BULK}
       AND (state = 'succeeded' OR state = 'cancelled'
            AND EXISTS (SELECT FROM bulwark.chunk WHERE job_id = id))
       AND (outcome -> 'verdicts', (outcome ->> 'rows')::bigint)
           IS DISTINCT FROM (told, done.rows)
"""
_RECORDS = f"""
    WITH told AS (
        SELECT job_id, key AS verdict, sum(value::bigint) AS rows
          FROM (SELECT job_id, counts FROM bulwark.chunk UNION ALL
                SELECT id, outcome -> 'verdicts' FROM bulwark.job
                 WHERE jsonb_typeof(outcome -> 'verdicts') = 'object'
                   AND NOT EXISTS (SELECT FROM bulwark.chunk WHERE job_id = id)
               ) AS counted (job_id, counts), jsonb_each_text(counts)
         WHERE key IN ('rejected', 'conflict', 'missing', 'kept') GROUP BY 1, 2
    ), kept AS (
        SELECT job_id, verdict, count(*) AS rows FROM bulwark.verdict GROUP BY 1, 2
    ), both_of_them AS (
        SELECT job_id, verdict, coalesce(told.rows, 0) AS wanted, coalesce(kept.rows, 0) AS found
          FROM told FULL JOIN kept USING (job_id, verdict)
          JOIN bulwark.job ON job.id = job_id
         WHERE kind IN {_BULK} OR kind IN {_SINGLE}
    )
    SELECT format('job %s counts %s rows as %s, and %s are recorded',
                  job_id, wanted, verdict, found),
           {_DIFFERENCE.format(wanted="wanted", found="found")}
      FROM both_of_them WHERE wanted <> found
"""
# Rows that an import has created because others name them are counted by no receipt: they are there
# only where a row of the chunk has taken effect, and compared with their table below.
_AUDIT = f"""
    WITH effects AS (
        SELECT job_id, chunk_no, tables.name AS table_name, sum(tables.rows) AS rows
          FROM bulwark.chunk JOIN bulwark.job ON job.id = job_id, LATERAL (
                   SELECT coalesce(payload ->> 'table', 'transfer'), value::bigint
                     FROM jsonb_each_text(counts) WHERE key = ANY ({_EFFECTS})
                    UNION ALL
                   SELECT key, value::bigint FROM jsonb_each_text(detail -> 'along')
               ) AS tables (name, rows)
         WHERE chunk_no > 0 AND kind IN {_BULK} GROUP BY 1, 2, 3
         UNION ALL
        SELECT id, 0, tables.name, tables.rows
          FROM bulwark.job, LATERAL (VALUES
                   ('transfer', (outcome -> 'verdicts' ->> 'moved')::bigint),
                   ('hero', (outcome -> 'verdicts' ->> 'moved')::bigint),
                   ('membership', (outcome ->> 'roles_ended')::bigint)
               ) AS tables (name, rows)
         WHERE kind IN {_SINGLE} AND state = 'succeeded'
    ), lines AS (
        SELECT job_id, chunk_no, table_name, sum(audit.rows) AS rows
          FROM bulwark.audit JOIN bulwark.job ON job.id = job_id
               LEFT JOIN bulwark.chunk USING (job_id, chunk_no)
         WHERE (job.kind IN {_BULK} OR job.kind IN {_SINGLE})
           AND (action = 'insert' AND payload ->> 'on_missing' = 'create'
                AND table_name <> payload ->> 'table' AND counts ?| {_EFFECTS}) IS NOT TRUE
         GROUP BY 1, 2, 3
    ), both_of_them AS (
        SELECT job_id, chunk_no, table_name,
               coalesce(effects.rows, 0) AS wanted, coalesce(lines.rows, 0) AS found
          FROM effects FULL JOIN lines USING (job_id, chunk_no, table_name)
    )
    SELECT format('chunk %s of job %s has changed %s rows of %s, and the audit has %s',
                  chunk_no, job_id, wanted, table_name, found),
           {_DIFFERENCE.format(wanted="wanted", found="found")}
      FROM both_of_them WHERE wanted <> found
"""
_CLAIMS = """
    SELECT format('the effects of chunk %s of job %s are of the claim %s, its end is of another',
                  audit.chunk_no, audit.job_id, audit.claim_id), 0 AS lost, 1 AS doubled
      FROM bulwark.audit JOIN bulwark.job ON job.id = audit.job_id
           LEFT JOIN bulwark.chunk USING (job_id, chunk_no)
     WHERE audit.claim_id <> coalesce(chunk.claim_id, job.claim_id)
     GROUP BY audit.chunk_no, audit.job_id, audit.claim_id
"""
_MOVES = """
    WITH steps AS (
        SELECT hero_id, from_team_id, to_team_id,
               lag(to_team_id) OVER way AS before, lag(id) OVER way IS NULL AS is_first,
               lead(id) OVER way IS NULL AS is_last
          FROM transfer WINDOW way AS (PARTITION BY hero_id ORDER BY id)
    )
    SELECT format('the transfers of hero %s are no way to where he is', hero_id),
           1 AS lost, 0 AS doubled
      FROM steps JOIN hero ON hero.id = hero_id
     WHERE NOT is_first AND from_team_id IS DISTINCT FROM before
        OR is_last AND to_team_id IS DISTINCT FROM team_id
     GROUP BY hero_id
"""
_PROGRESS = """
    SELECT format('job %s still tells progress', job_id), 0 AS lost, 0 AS doubled
      FROM bulwark.progress
"""
_ENDED_SESSIONS = """
    SELECT format('worker %s has ended, and its session %s is %s, with %s locks',
                  worker.id, activity.pid, activity.state,
                  (SELECT count(*) FROM pg_locks WHERE pid = activity.pid))
      FROM bulwark.worker
      JOIN pg_stat_activity AS activity
        ON starts_with(application_name, 'bulwark ' || worker.id)
     WHERE ended_at IS NOT NULL AND activity.datname = current_database()
"""
_CHECKS = (
    _NOT_ENDED,
    _RECEIPTS,
    _GAPS,
    _UNJUDGED,
    _OUTCOMES,
    _RECORDS,
    _AUDIT,
    _CLAIMS,
    _MOVES,
    _PROGRESS,
)
_INSERTED_TABLES = "SELECT DISTINCT table_name FROM bulwark.audit WHERE action = 'insert'"
_SESSION_END_S = 5.0


@dataclass
class Losses:
    """What does not hold, in sentences; true when there is anything."""

    lost: int = 0
    doubled: int = 0
    violations: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.violations)

    def add(self, rows: Sequence[Sequence[object]]) -> None:
        for text, lost, doubled in rows:
            self.violations.append(str(text))
            self.lost += int(str(lost))
            self.doubled += int(str(doubled))


async def check_invariants(database_url: str, *, seeded: Mapping[str, int] | None = None) -> Losses:
    """Look at everything that jobs have left behind; for a database where nothing was purged.

    `seeded` is how many rows, by table, the test itself has written beside those of jobs: in the
    tables into which jobs insert, every other row must be in the audit.
    """
    losses = Losses()
    async with connected(database_url) as connection:
        for check in _CHECKS:
            losses.add(await connection.fetch(check))
        for (table,) in await connection.fetch(_INSERTED_TABLES):
            losses.add(await _inserted(connection, table, (seeded or {}).get(table, 0)))
        losses.add([(text, 0, 0) for text in await _sessions_of_the_ended(connection)])
    return losses


async def _inserted(
    connection: asyncpg.Connection, table: str, seeded: int
) -> list[tuple[str, int, int]]:
    """Compare the audit's lines of inserts with the rows of a table whose key is `id`."""
    wrong = [
        tuple(row)
        for row in await connection.fetch(
            f"""
            SELECT format('chunk %s of job %s has inserted %s rows into %s, and %s are there',
                          chunk_no, job_id, rows, table_name, there),
                   {_DIFFERENCE.format(wanted="rows", found="there")}
              FROM bulwark.audit, LATERAL (
                       SELECT (SELECT count(*) FROM "{table}" AS t,
                                      jsonb_array_elements(keys -> 'ranges') AS r
                                WHERE t.id BETWEEN (r ->> 0)::bigint AND (r ->> 1)::bigint)
                            + (SELECT count(*) FROM "{table}" AS t,
                                      jsonb_array_elements(keys -> 'keys') AS k
                                WHERE t.id = (k ->> 0)::bigint)
                   ) AS found (there)
             WHERE action = 'insert' AND table_name = $1 AND rows <> there
            """,
            table,
        )
    ]
    there = await connection.fetchval(f'SELECT count(*) FROM "{table}"')
    told = await connection.fetchval(
        "SELECT sum(rows) FROM bulwark.audit WHERE action = 'insert' AND table_name = $1", table
    )
    if there - seeded != told:
        text = f"{there - seeded} rows of {table} are by jobs, and the audit tells of {told}"
        wrong.append((text, 0, max(there - seeded - told, 0)))
    return wrong


async def _sessions_of_the_ended(connection: asyncpg.Connection) -> list[str]:
    """PostgreSQL notices a moment later that a client has gone."""
    deadline_s = time.monotonic() + _SESSION_END_S
    while left := [str(row[0]) for row in await connection.fetch(_ENDED_SESSIONS)]:
        if time.monotonic() > deadline_s:
            break
        await asyncio.sleep(0.05)  # between two looks at what ends by itself
    return left
