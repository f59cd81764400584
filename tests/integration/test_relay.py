"""Every queued job is heard of sooner or later, whatever Redis has lost."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from arq.connections import ArqRedis
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from structlog.testing import capture_logs

from jobs._bell import Bell, job_id_of, queue_key
from jobs._declaration import discover_jobs
from jobs._producer import Producer
from tests.inprocess import Bench
from tests.sample_jobs.act_out import ActOut
from tests.stage import SAMPLE_JOBS, Stage
from tests.workers import until
from worker import relay as relay_module
from worker.embedded import EmbeddedValkey
from worker.redis_pool import make_redis
from worker.relay import Relay

Sessions = async_sessionmaker[AsyncSession]
NOTICED_WITHIN_S = 5.0


@pytest.fixture
async def redis(valkey: EmbeddedValkey) -> AsyncIterator[ArqRedis]:
    async with make_redis(valkey.url, 5.0) as redis:
        yield redis


@pytest.fixture
def relay(sessions: Sessions, redis: ArqRedis) -> Relay:
    return Relay(uuid4(), sessions, redis, ("default", "bulk"), 0.05)


@pytest.fixture
def producer(sessions: Sessions, redis: ArqRedis) -> Producer:
    """Rings what it enqueues."""
    return Producer(sessions, discover_jobs(SAMPLE_JOBS), Bell(redis))


@pytest.fixture
def silent(sessions: Sessions) -> Producer:
    """Has no bell."""
    return Producer(sessions, discover_jobs(SAMPLE_JOBS))


@asynccontextmanager
async def running(relay: Relay) -> AsyncIterator[None]:
    task = asyncio.create_task(relay.run_forever())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def heard(redis: ArqRedis, queue: str = "default") -> list[tuple[UUID, int]]:
    """The rings in a queue: job and number."""
    names = [name.decode() for name in await redis.zrange(queue_key(queue), 0, -1)]
    return [(job_id_of(name), int(name.partition(":")[2])) for name in names]


async def until_heard(redis: ArqRedis, job_id: UUID, queue: str = "default") -> None:
    async def look() -> bool:
        return job_id in {one for one, _ in await heard(redis, queue)}

    await until(look, "the job is rung", NOTICED_WITHIN_S)


async def seconds_to_next_ring(stage: Stage, job_id: UUID) -> float:
    wait_s: float = await stage.value(
        "SELECT extract(epoch FROM next_ring_at - now())::float FROM bulwark.job WHERE id = $1",
        job_id,
    )
    return wait_s


async def test_a_ring_that_was_lost_is_rung_again_under_a_new_number(
    stage: Stage, producer: Producer, relay: Relay, redis: ArqRedis
) -> None:
    job_id = (await producer.enqueue(ActOut())).job_id
    assert await heard(redis) == [(job_id, 1)]
    await redis.zrem(queue_key("default"), f"{job_id}:1")
    await stage.make_due(job_id)
    await relay.ring_due()
    assert await heard(redis) == [(job_id, 2)]
    assert await redis.exists(f"arq:job:{job_id}:1") == 0
    assert await redis.exists(f"arq:job:{job_id}:2") == 1


async def test_a_job_that_was_just_rung_is_left_in_peace(
    stage: Stage, producer: Producer, relay: Relay
) -> None:
    job_id = (await producer.enqueue(ActOut())).job_id
    assert await relay.ring_due() == []
    assert await seconds_to_next_ring(stage, job_id) == pytest.approx(10, abs=5)


@pytest.mark.parametrize(("age", "wait_s"), [("1 s", 10), ("60 s", 60), ("2 h", 300)])
async def test_a_job_that_nobody_takes_is_rung_less_and_less_often(
    stage: Stage, silent: Producer, relay: Relay, age: str, wait_s: float
) -> None:
    job_id = (await silent.enqueue(ActOut())).job_id
    await stage.value(
        f"UPDATE bulwark.job SET queued_at = now() - interval '{age}' WHERE id = $1", job_id
    )
    await relay.ring_due()
    assert await seconds_to_next_ring(stage, job_id) == pytest.approx(wait_s, abs=5)


async def test_a_job_enqueued_without_a_bell_is_rung_in_its_own_queue(
    silent: Producer, relay: Relay, redis: ArqRedis
) -> None:
    async with running(relay):
        job_id = (await silent.enqueue(ActOut(), queue="bulk")).job_id
        await until_heard(redis, job_id, "bulk")
    assert await heard(redis) == []


async def test_a_job_for_later_is_rung_when_it_is_due_and_not_before(
    stage: Stage, producer: Producer, relay: Relay, redis: ArqRedis
) -> None:
    async with running(relay):
        due = datetime.now(UTC) + timedelta(seconds=1)
        job_id = (await producer.enqueue(ActOut(), run_at=due)).job_id
        far = (await producer.enqueue(ActOut(), run_at=due + timedelta(hours=1))).job_id
        assert await heard(redis) == []
        await until_heard(redis, job_id)
        assert await stage.value("SELECT clock_timestamp() >= $1", due)
    assert [one for one, _ in await heard(redis)] == [job_id]
    assert await seconds_to_next_ring(stage, far) > 3000


async def test_an_emptied_redis_is_noticed_and_every_queued_job_rung_again(
    producer: Producer, relay: Relay, redis: ArqRedis
) -> None:
    due, later = ActOut(), datetime.now(UTC) + timedelta(hours=1)
    async with running(relay):
        ids = {(await producer.enqueue(due)).job_id for _ in range(3)}
        await producer.enqueue(due, run_at=later)
        await until(lambda: redis.keys("bulwark:relay:*"), "the relay has left its mark")
        await redis.flushall()
        for job_id in ids:
            await until_heard(redis, job_id)
    assert {one for one, _ in await heard(redis)} == ids


async def test_a_redis_that_was_emptied_again_is_noticed_again(
    producer: Producer, relay: Relay, redis: ArqRedis
) -> None:
    async with running(relay):
        job_id = (await producer.enqueue(ActOut())).job_id
        for _ in range(3):
            await until(lambda: redis.keys("bulwark:relay:*"), "the relay has left its mark")
            await redis.flushall()
            await until_heard(redis, job_id)


async def test_a_redis_that_stopped_and_came_back_empty_is_rung_again(
    producer: Producer, relay: Relay, redis: ArqRedis, valkey: EmbeddedValkey
) -> None:
    with capture_logs() as logs:
        async with running(relay):
            job_id = (await producer.enqueue(ActOut())).job_id
            await until(lambda: redis.keys("bulwark:relay:*"), "the relay has left its mark")
            await asyncio.to_thread(valkey.stop)

            async def failed() -> bool:
                return any(line["event"] == "relay.failed" for line in logs)

            await until(failed, "the relay says that Redis is away")
            await asyncio.to_thread(valkey.start)
            await until_heard(redis, job_id)


async def test_a_ring_that_redis_did_not_take_is_rung_when_it_is_back(
    stage: Stage, silent: Producer, relay: Relay, redis: ArqRedis, valkey: EmbeddedValkey
) -> None:
    await asyncio.to_thread(valkey.stop)
    async with running(relay):
        job_id = (await silent.enqueue(ActOut())).job_id
        await asyncio.to_thread(valkey.start)
        await until_heard(redis, job_id)


async def test_rings_that_a_full_redis_refused_are_rung_once_it_takes_them(
    stage: Stage, silent: Producer, relay: Relay, redis: ArqRedis
) -> None:
    async with running(relay):
        await until(lambda: redis.keys("bulwark:relay:*"), "the relay has left its mark")
        await redis.config_set("maxmemory", 1)
        job_id = (await silent.enqueue(ActOut())).job_id

        async def refused() -> bool:
            return bool((await stage.row(job_id))["ring"] > 0)

        await until(refused, "the relay has tried to ring")
        await redis.config_set("maxmemory", 0)
        await until_heard(redis, job_id)


async def test_after_a_mere_error_of_redis_only_the_rings_that_it_refused_are_rung_again(
    stage: Stage, producer: Producer, silent: Producer, relay: Relay, redis: ArqRedis
) -> None:
    heard_already = (await producer.enqueue(ActOut())).job_id
    with capture_logs() as logs:
        async with running(relay):
            await until(lambda: redis.keys("bulwark:relay:*"), "the relay has left its mark")
            await redis.config_set("maxmemory", 1)
            refused = (await silent.enqueue(ActOut())).job_id

            async def failed() -> bool:
                return any(line["event"] == "relay.failed" for line in logs)

            await until(failed, "Redis has refused the ring")
            await redis.config_set("maxmemory", 0)
            await until_heard(redis, refused)
    assert sorted(await heard(redis)) == sorted([(heard_already, 1), (refused, 1)])
    assert (await stage.row(heard_already))["ring"] == 1
    assert "relay.rings_lost" not in {line["event"] for line in logs}


async def test_several_relays_at_once_ring_each_job_once(
    sessions: Sessions, silent: Producer, redis: ArqRedis
) -> None:
    accepted = await silent.enqueue_many([ActOut() for _ in range(40)])
    relays = [Relay(uuid4(), sessions, redis, ("default",), 1.0) for _ in range(4)]
    rung = await asyncio.gather(*(one.ring_due() for one in relays))
    numbers = [(ring.job_id, ring.number) for rings in rung for ring in rings]
    assert sorted(numbers) == sorted((one.job_id, 1) for one in accepted)


async def test_rings_of_jobs_that_have_ended_are_swept_out(
    stage: Stage,
    producer: Producer,
    relay: Relay,
    redis: ArqRedis,
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(relay_module, "SWEEP_INTERVAL_S", 0.0)
    ended, waiting = [(await producer.enqueue(ActOut())).job_id for _ in range(2)]
    await (await bench.register()).deliver(ended)
    await redis.zadd(queue_key("default"), {"a message of somebody else": 1})
    async with running(relay):

        async def swept() -> Any:
            return await redis.zrange(queue_key("default"), 0, -1) == [
                b"a message of somebody else",
                f"{waiting}:1".encode(),
            ]

        await until(swept, "only the ring of the ended job is gone")
    assert await redis.exists(f"arq:job:{ended}:1") == 0
