"""Stock arq that carries out the transfers without our guarantees, as a process of its own.

Its arguments are the URL of Redis, that of PostgreSQL, and how many jobs it runs at a time.
"""

import sys
from typing import Any, cast

import asyncpg
from arq.typing import WorkerCoroutine
from arq.worker import func, run_worker

from tests.benchmarks.stock_arq import redis_settings

POLL_DELAY_S = 0.01
FUNCTION = """
    CREATE OR REPLACE FUNCTION transfer_plainly(hero_no bigint, from_no bigint, to_no bigint)
    RETURNS void LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM id FROM team WHERE id IN (from_no, to_no) AND deleted_at IS NULL
          ORDER BY id FOR NO KEY UPDATE;
        PERFORM id FROM hero WHERE id = hero_no AND team_id = from_no AND deleted_at IS NULL
            FOR NO KEY UPDATE;
        IF NOT FOUND THEN RAISE EXCEPTION 'hero % is not in team %', hero_no, from_no; END IF;
        UPDATE hero SET team_id = to_no, version = version + 1, updated_at = now()
         WHERE id = hero_no;
        UPDATE membership SET deleted_at = now(), version = version + 1, updated_at = now()
         WHERE hero_id = hero_no AND team_id = from_no AND deleted_at IS NULL;
        INSERT INTO transfer (hero_id, from_team_id, to_team_id) VALUES (hero_no, from_no, to_no);
    END $$
"""


async def transfer_plainly(ctx: dict[Any, Any], hero_id: int, team_id: int, to_id: int) -> None:
    """One call, which commits by itself."""
    await ctx["pool"].execute("SELECT transfer_plainly($1, $2, $3)", hero_id, team_id, to_id)


def settings(database_url: str, max_jobs: int) -> type:
    """What arq's command line would be given; each job at a time has a connection."""

    async def connect(ctx: dict[Any, Any]) -> None:
        ctx["pool"] = await asyncpg.create_pool(database_url, min_size=max_jobs, max_size=max_jobs)

    return type(
        "WorkerSettings",
        (),
        {
            "functions": [func(cast(WorkerCoroutine, transfer_plainly), name="transfer_plainly")],
            "poll_delay": POLL_DELAY_S,
            "max_jobs": max_jobs,
            "on_startup": connect,
        },
    )


if __name__ == "__main__":
    redis_url, postgres_url, jobs = sys.argv[1:]
    run_worker(settings(postgres_url, int(jobs)), redis_settings=redis_settings(redis_url))
