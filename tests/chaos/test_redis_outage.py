"""Redis goes away and comes back while a worker is busy."""

import asyncio
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from jobs import Producer, discover_jobs
from jobs._spooling import enqueue_file
from tests.workers import environment, until, workers
from worker.embedded import embedded_valkey

ROWS = 60_000


async def test_a_busy_worker_outlives_redis_and_nothing_is_lost_or_doubled(
    database_url: str, sessions: async_sessionmaker[AsyncSession], tmp_path: Path
) -> None:
    path = tmp_path / "teams.csv"
    path.write_text("name\n" + "".join(f"Team {n}\n" for n in range(ROWS)))
    producer = Producer(sessions, discover_jobs())

    async def scalar(sql: str) -> object:
        async with sessions() as session:
            return await session.scalar(sa.text(sql))

    async def chunks() -> int:
        return int(str(await scalar("SELECT count(*) FROM bulwark.chunk WHERE chunk_no > 0")))

    async def succeeded() -> bool:
        return await scalar("SELECT state FROM bulwark.job") == "succeeded"

    with embedded_valkey() as valkey, workers(tmp_path) as start:
        env = environment(database_url, valkey.url, redis_timeout_s="1")
        worker = start(env)
        await enqueue_file(producer, path, {"table": "team", "chunk_rows": 200})

        async def some() -> bool:
            return await chunks() >= 5

        await until(some, "the import is under way")
        valkey.kill()
        await until(lambda: _said(worker.log, "worker.redis_lost"), "the outage is noticed")
        valkey.start()
        await until(succeeded, "the import has ended", 60)
        assert worker.running
        assert worker.terminate() == 0
    assert await scalar("SELECT count(*) FROM team") == ROWS
    assert await scalar("SELECT sum(rows) FROM bulwark.audit") == ROWS
    assert await scalar("SELECT attempt FROM bulwark.job") == 0


async def _said(log: Path, event: str) -> bool:
    return event in await asyncio.to_thread(log.read_text)
