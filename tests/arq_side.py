"""Workers in the test's own process that hear through Redis, and plain arq clients to be heard."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from arq.connections import ArqRedis
from arq.worker import Worker as StockWorker

from jobs._bell import deserialize, serialize
from tests.inprocess import Bench
from worker.arq_worker import ArqWorker
from worker.delivery import Delivery
from worker.ear import Ear
from worker.redis_pool import make_redis
from worker.shutdown import cancel_until_done

POLL_INTERVAL_S = 0.05


@asynccontextmanager
async def plain_client(redis_url: str) -> AsyncIterator[ArqRedis]:
    """What somebody has who knows arq and the serializer, and nothing of Bulwark."""
    client: ArqRedis = ArqRedis.from_url(redis_url)
    client.job_serializer, client.job_deserializer = serialize, deserialize
    async with client:
        yield client


@asynccontextmanager
async def hearing(
    redis_url: str,
    queues: Sequence[str] = ("default", "bulk"),
    poll_interval_s: float = POLL_INTERVAL_S,
) -> AsyncIterator[Ear]:
    """An ear of its own."""
    waiting = make_redis(redis_url, 5.0 + poll_interval_s)
    async with make_redis(redis_url, 5.0) as redis:
        ear = Ear(redis, waiting, queues, poll_interval_s)
        try:
            yield ear
        finally:
            await ear.close()


@asynccontextmanager
async def working(
    bench: Bench,
    redis_url: str,
    *,
    queues: Sequence[str] = ("default",),
    max_jobs: int = 10,
    poll_interval_s: float = POLL_INTERVAL_S,
) -> AsyncIterator[ArqWorker]:
    """A worker with a row of its own that works while the block lasts."""
    async with hearing(redis_url, queues, poll_interval_s) as ear:
        delivery = Delivery(await bench.register(), ear)
        worker = ArqWorker(
            ear,
            delivery.carry_out,
            bench.jobs,
            redis_pool=make_redis(redis_url, 5.0),
            max_jobs=max_jobs,
        )
        async with running(worker):
            yield worker


@asynccontextmanager
async def running(worker: StockWorker) -> AsyncIterator[None]:
    """Let a worker, ours or arq's own, work while the block lasts."""
    task = asyncio.create_task(worker.async_run())
    try:
        yield
    finally:
        worker.allow_pick_jobs = False
        await cancel_until_done(task)
        await worker.close()
