"""How often enqueueing goes to Redis and back."""

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from jobs import Bell, Producer, discover_jobs
from tests.sample_jobs.act_out import ActOut
from tests.stage import SAMPLE_JOBS
from tests.wire import Wire, wired
from worker.redis_pool import make_redis


@pytest.fixture
async def wire_and_redis(redis_url: str) -> AsyncIterator[tuple[Wire, Redis]]:
    """A wire that a client has connected through already."""
    async with wired(redis_url) as (wire, url), make_redis(url, 5.0) as redis:
        await redis.ping()
        wire.round_trips = 0
        yield wire, redis


async def executions(redis_url: str) -> int:
    """How many pipelines Redis has executed."""
    async with Redis.from_url(redis_url) as redis:
        counted = await redis.info("commandstats")
    return int(counted.get("cmdstat_exec", {}).get("calls", 0))


async def test_enqueueing_takes_one_round_trip(
    sessions: async_sessionmaker[AsyncSession], wire_and_redis: tuple[Wire, Redis]
) -> None:
    wire, redis = wire_and_redis
    await Producer(sessions, discover_jobs(SAMPLE_JOBS), Bell(redis)).enqueue(ActOut())
    assert wire.round_trips == 1


async def test_enqueueing_many_takes_one_pipeline(
    sessions: async_sessionmaker[AsyncSession], redis_url: str
) -> None:
    async with make_redis(redis_url, 5.0) as redis:
        producer = Producer(sessions, discover_jobs(SAMPLE_JOBS), Bell(redis))
        before = await executions(redis_url)
        accepted = await producer.enqueue_many([ActOut() for _ in range(1000)])
        assert await executions(redis_url) == before + 1
        assert await redis.zcard("arq:queue") == len(accepted)
