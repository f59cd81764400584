"""Real workers that are killed while they do many jobs in one transaction."""

from collections import Counter
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import pytest
import redis
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from jobs._bell import queue_key
from jobs._discovery import discover_jobs
from jobs._producer import Producer
from tests.sample_jobs.take_down import TakeDown
from tests.stage import SAMPLE_JOBS, Stage
from tests.workers import Start, environment, let_redis_be_known, until

QUICK = {
    "job_modules": ",".join(SAMPLE_JOBS),
    "beat_interval_s": "0.3",
    "lost_after_s": "1.0",
    "relay_interval_s": "0.1",
    "shutdown_grace_s": "0.2",
    "log_format": "json",
}


@pytest.fixture
def producer(sessions: async_sessionmaker[AsyncSession]) -> Producer:
    return Producer(sessions, discover_jobs(SAMPLE_JOBS))


@pytest.fixture
def quick(database_url: str, redis_url: str) -> dict[str, str]:
    return environment(database_url, redis_url, **QUICK)


async def accept(producer: Producer, payloads: Sequence[TakeDown]) -> list[UUID]:
    return [one.job_id for one in await producer.enqueue_many(payloads)]


async def all_end(stage: Stage, number: int) -> None:
    async def ended() -> bool:
        left = "SELECT count(*) FROM bulwark.job WHERE finished_at IS NOT NULL"
        return bool(await stage.value(left) == number)

    await until(ended, "all jobs have ended", 60)


async def ends(stage: Stage, job_ids: Sequence[UUID]) -> Counter[tuple[str, Any, int]]:
    return Counter([await stage.ended_as(job_id) for job_id in job_ids])


SUCCEEDED = ("succeeded", None, 0)


async def test_a_worker_killed_in_a_batch_leaves_nothing_and_another_does_each_job_once(
    stage: Stage, producer: Producer, quick: dict[str, str], start: Start
) -> None:
    payloads = [TakeDown(note=f"{at}", gate=at == 250) for at in range(300)]
    await stage.close_gate()
    job_ids = await accept(producer, payloads)
    first = start(quick)
    await stage.somebody_at_gate()
    first.kill()
    start(quick)
    await stage.open_gate()
    await all_end(stage, len(job_ids))
    assert await ends(stage, job_ids) == {SUCCEEDED: 300}
    assert sorted(await stage.notes(), key=int) == [f"{at}" for at in range(300)]


async def test_one_poisonous_job_among_fifty_is_found_and_the_others_are_done_once(
    stage: Stage, producer: Producer, quick: dict[str, str], start: Start
) -> None:
    payloads = [TakeDown(note=f"{at}", then="die" if at == 20 else "return") for at in range(50)]
    job_ids = await accept(producer, payloads)

    async def is_dead() -> bool:
        return not worker.running

    for _ in range(3):
        worker = start(quick)
        await until(is_dead, "the worker has died of the job")
    start(quick)
    await all_end(stage, 50)
    poisonous = job_ids.pop(20)
    assert (await stage.row(poisonous))["reason"] == "poisoned"
    assert await ends(stage, job_ids) == {SUCCEEDED: 49}
    assert sorted(await stage.notes(), key=int) == [f"{at}" for at in range(50) if at != 20]


async def test_a_worker_told_to_stop_in_a_batch_gives_it_back_and_ends_in_order(
    stage: Stage, producer: Producer, quick: dict[str, str], start: Start
) -> None:
    await let_redis_be_known(quick, start)
    payloads = [TakeDown(note=f"{at}", gate=at == 0) for at in range(20)]
    await stage.close_gate()
    job_ids = await accept(producer, payloads)
    worker = start(quick)
    await stage.somebody_at_gate()
    assert worker.terminate() == 0
    assert await ends(stage, job_ids) == {("queued", "given_back", 0): 20}
    await stage.open_gate()
    start(quick)
    await all_end(stage, 20)
    assert await ends(stage, job_ids) == {SUCCEEDED: 20}


async def test_rings_of_jobs_that_came_along_do_not_stay_in_redis(
    stage: Stage, producer: Producer, quick: dict[str, str], redis_url: str, start: Start
) -> None:
    job_ids = await accept(producer, [TakeDown(note=f"{at}") for at in range(400)])
    start(quick)
    await all_end(stage, len(job_ids))
    with redis.Redis.from_url(redis_url) as client:

        async def empty() -> bool:
            return bool(client.zcard(queue_key("default")) == 0)

        await until(empty, "the queue in Redis is empty")
        assert not list(client.scan_iter("arq:job:*"))
    assert len(await stage.notes()) == 400
