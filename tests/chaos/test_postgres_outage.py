"""PostgreSQL goes away and comes back while a worker has nothing to do."""

import asyncio
from pathlib import Path

from db.migrations import upgrade
from tests.own_servers import own_postgres
from tests.workers import WorkerProcess, environment, until, workers

PARTS = {
    "relay.failed": "relay.back",
    "rescue.failed": "rescue.back",
    "beat.missed": "beat.back",
    "schedule.failed": "schedule.back",
}


async def until_said(worker: WorkerProcess, *wanted: str) -> None:
    async def said() -> bool:
        return set(wanted) <= set(worker.told())

    await until(said, f"the worker has said {wanted}")


async def test_each_part_of_a_worker_says_once_that_postgresql_is_away_and_once_that_it_is_back(
    redis_url: str, tmp_path: Path
) -> None:
    with own_postgres() as postgres, workers(tmp_path) as start:
        await asyncio.to_thread(upgrade, postgres.url)
        worker = start(
            environment(
                postgres.url,
                redis_url,
                beat_interval_s="3",  # so long a beat may take
                relay_interval_s="0.1",
                job_modules="tests.sample_jobs.keep_watch",
                log_format="json",
            )
        )
        await until_said(worker, "worker.started")
        before = len(worker.told())
        await asyncio.to_thread(postgres.stop)
        await until_said(worker, *PARTS)
        await asyncio.to_thread(postgres.start)
        await until_said(worker, *PARTS.values())
        told = worker.told()[before:]
        assert [told.count(one) for one in (*PARTS, *PARTS.values())] == [1] * 8
        assert await asyncio.to_thread(worker.terminate) == 0
