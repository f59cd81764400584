"""What a running job leaves in its queue in Redis."""

from pathlib import Path

import sqlalchemy as sa
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from jobs import Bell, Producer, discover_jobs
from jobs._bell import queue_key
from jobs._spooling import enqueue_file
from tests.workers import Start, until


async def test_a_running_job_does_not_stand_in_the_way_of_others_in_its_queue(
    env: dict[str, str],
    redis_url: str,
    sessions: async_sessionmaker[AsyncSession],
    start: Start,
    tmp_path: Path,
) -> None:
    path = tmp_path / "teams.csv"
    path.write_text("name\n" + "".join(f"Team {n}\n" for n in range(40_000)))

    async def chunks_while_running() -> bool:
        query = "SELECT count(*) FROM bulwark.chunk, bulwark.job WHERE state = 'running'"
        async with sessions() as session:
            return bool(await session.scalar(sa.text(query)))

    async with Redis.from_url(redis_url) as redis:
        producer = Producer(sessions, discover_jobs(), Bell(redis))
        await enqueue_file(producer, path, {"table": "team", "chunk_rows": 100})
        assert await redis.zcard(queue_key("default")) == 1
        worker = start(env)
        await until(chunks_while_running, "the import is under way")
        assert await redis.zcard(queue_key("default")) == 0
        assert worker.running
