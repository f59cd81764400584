"""Jobs whose rings were heard in vain are taken up by a worker that knows their kind."""

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

from db.ledger import worker
from jobs import Bell, Payload, Producer, discover_jobs
from jobs._bell import job_id_of, kind_of, queue_key
from jobs._discovery import Jobs
from tests.arq_side import hearing
from tests.sample_jobs.act_out import ActOut
from tests.sample_jobs.take_down import TakeDown
from tests.stage import SAMPLE_JOBS, Stage
from tests.workers import until
from worker import gleaner as gleaner_module
from worker.ear import Ear
from worker.gleaner import Gleaner
from worker.message import Message
from worker.redis_pool import make_redis
from worker.shutdown import cancel_until_done

Sessions = async_sessionmaker[AsyncSession]
KNOWN = discover_jobs(SAMPLE_JOBS)
JOBS = Jobs(KNOWN[kind] for kind in ("act_out", "take_down"))


@pytest.fixture
async def ear(redis_url: str) -> AsyncIterator[Ear]:
    """Hears nothing from Redis, where its queue is empty."""
    async with hearing(redis_url, ["empty"]) as ear:
        yield ear


@pytest.fixture
def gleaner(sessions: Sessions, redis: ArqRedis, ear: Ear) -> Gleaner:
    return Gleaner(sessions, redis, ear, ("default",), JOBS)


@pytest.fixture
def producer(sessions: Sessions, redis: ArqRedis) -> Producer:
    return Producer(sessions, discover_jobs(SAMPLE_JOBS), Bell(redis))


async def rung_in_vain(
    redis: ArqRedis,
    producer: Producer,
    payload: Payload,
    queue: str = "default",
    priority: int = 0,
) -> UUID:
    """Enqueue a job whose ring is taken out of Redis, as by a worker that does not know it."""
    job_id = (await producer.enqueue(payload, queue=queue, priority=priority)).job_id
    await redis.zrem(queue_key(queue), f"{job_id}:1")
    await redis.delete(f"arq:job:{job_id}:1")
    return job_id


async def gleaned(gleaner: Gleaner, ear: Ear) -> list[tuple[UUID, str | None]]:
    """What the ear hears of one round: jobs and their kinds."""
    heard: list[Message] = []
    task = asyncio.create_task(gleaner.glean())
    while not task.done():
        heard += await ear.claim(3)
        await asyncio.wait([task], timeout=0.01)
    await task
    assert all(one.is_ring for one in heard)
    return [(job_id_of(one.arq_id.decode()), kind_of(one.content)) for one in heard]


@asynccontextmanager
async def live_worker(
    sessions: Sessions, kinds: list[str] | None, queues: tuple[str, ...] = ("default",)
) -> AsyncIterator[UUID]:
    worker_id = uuid4()
    async with sessions.begin() as session:
        await worker.register(session, worker_id, "here", 1, queues, kinds)
    yield worker_id
    async with sessions.begin() as session:
        await worker.deregister(session, worker_id)


async def test_at_the_start_every_job_that_was_heard_in_vain_is_taken_up(
    gleaner: Gleaner, producer: Producer, redis: ArqRedis, ear: Ear
) -> None:
    first = await rung_in_vain(redis, producer, ActOut())
    second = await rung_in_vain(redis, producer, TakeDown(note="x"))
    assert await gleaned(gleaner, ear) == [(first, "act_out"), (second, "take_down")]
    assert await gleaned(gleaner, ear) == []


async def test_what_will_be_heard_anyhow_or_is_for_others_is_left_alone(
    gleaner: Gleaner,
    producer: Producer,
    redis: ArqRedis,
    ear: Ear,
    sessions: Sessions,
    stage: Stage,
) -> None:
    await producer.enqueue(ActOut())
    await producer.enqueue(ActOut(), run_at=datetime.now(UTC) + timedelta(hours=1))
    await Producer(sessions, discover_jobs(SAMPLE_JOBS)).enqueue(ActOut())
    await rung_in_vain(redis, producer, ActOut(), queue="bulk")
    for change in (
        "kind = 'something_else'",
        "next_ring_at = now()",
        "crashes = 2",
        "run_at = now() + interval '1 h'",
    ):
        job_id = await rung_in_vain(redis, producer, ActOut())
        await stage.value(f"UPDATE bulwark.job SET {change} WHERE id = $1", job_id)
    assert await gleaned(gleaner, ear) == []


@pytest.mark.parametrize(
    ("kinds", "queues", "taken_up"),
    [
        (["act_out", "take_down"], ("default",), []),
        (["take_down"], ("default", "bulk"), ["act_out"]),
        ([], ("default",), ["act_out", "take_down"]),
        (None, ("default",), ["act_out", "take_down"]),
        ([], ("bulk",), []),
    ],
)
async def test_later_only_kinds_are_gone_through_that_a_live_worker_beside_does_not_know(
    gleaner: Gleaner,
    producer: Producer,
    redis: ArqRedis,
    ear: Ear,
    sessions: Sessions,
    kinds: list[str] | None,
    queues: tuple[str, ...],
    taken_up: list[str],
) -> None:
    await gleaner.glean()
    await rung_in_vain(redis, producer, ActOut())
    await rung_in_vain(redis, producer, TakeDown(note="x"))
    async with live_worker(sessions, ["act_out", "take_down"]):
        async with live_worker(sessions, kinds, queues):
            assert [kind for _, kind in await gleaned(gleaner, ear)] == taken_up
        assert await gleaned(gleaner, ear) == []


async def test_more_jobs_than_a_page_are_taken_up_page_by_page(
    gleaner: Gleaner,
    producer: Producer,
    redis: ArqRedis,
    ear: Ear,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gleaner_module, "PAGE", 4)
    ids = [await rung_in_vain(redis, producer, ActOut()) for _ in range(12)]
    assert [one for one, _ in await gleaned(gleaner, ear)] == ids


async def test_free_slots_are_filled_from_redis_when_few_jobs_are_taken_up(
    sessions: Sessions, producer: Producer, redis: ArqRedis, redis_url: str
) -> None:
    missed = await rung_in_vain(redis, producer, ActOut())
    rung = [(await producer.enqueue(ActOut())).job_id for _ in range(3)]
    async with hearing(redis_url) as ear:
        with capture_logs() as logs:
            gleaner = Gleaner(sessions, redis, ear, ("default",), JOBS)
            task = asyncio.create_task(gleaner.glean())
            await until(lambda: _told(logs, "glean.found"), "the job is found")
            heard = [job_id_of(one.arq_id.decode()) for one in await ear.claim(3)]
            await task
    assert heard == [missed, *rung[:2]]


async def test_jobs_of_low_priority_are_waited_for_by_no_other(
    gleaner: Gleaner, producer: Producer, redis: ArqRedis, ear: Ear
) -> None:
    low = [await rung_in_vain(redis, producer, ActOut(), priority=-1) for _ in range(3)]
    high = await rung_in_vain(redis, producer, ActOut())
    gleaning = asyncio.create_task(gleaner.glean())
    first = await until(lambda: ear.claim(3, 1), "jobs are taken up")
    await gleaning
    later = [await ear.claim(3, 1) for _ in range(3)]
    heard = [[job_id_of(one.arq_id.decode()) for one in some] for some in (first, *later)]
    assert heard == [[high, low[0]], [low[1]], [low[2]], []]


async def test_while_redis_is_away_it_is_told_once_and_then_gone_on(
    sessions: Sessions,
    ear: Ear,
    producer: Producer,
    redis: ArqRedis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gleaner_module, "GLEAN_INTERVAL_S", 0.05)
    job_id = await rung_in_vain(redis, producer, ActOut())
    gleaner = Gleaner(sessions, make_redis("redis://127.0.0.1:1/0", 1.0), ear, ("default",), JOBS)
    with capture_logs() as logs:
        task = asyncio.create_task(gleaner.run_forever())
        await until(lambda: _told(logs, "glean.failed"), "it fails")
        gleaner._bell = Bell(redis)
        await until(lambda: _told(logs, "glean.found"), "it goes on")
        assert [job_id_of(one.arq_id.decode()) for one in await ear.claim(3)] == [job_id]
        await until(lambda: _told(logs, "glean.back"), "it says so")
        await cancel_until_done(task)
    told = [one["event"] for one in logs]
    assert (told.count("glean.failed"), told.count("glean.back")) == (1, 1)


async def _told(logs: list[Any], event: str) -> bool:
    return any(one["event"] == event for one in logs)
