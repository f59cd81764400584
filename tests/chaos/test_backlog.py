"""Jobs pile up while no worker runs, and one worker does them all."""

import time

import pytest
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from jobs import Payload, Producer, discover_jobs
from jobs._bell import Bell
from tests.chaos.conftest import Provoked
from tests.invariants import check_invariants
from tests.sample_jobs.act_out import ActOut
from tests.sample_jobs.take_down import TakeDown
from tests.stage import SAMPLE_JOBS, Stage
from tests.workers import Start, environment, until

Sessions = async_sessionmaker[AsyncSession]
AT_A_TIME = 1_000
MOST_S = 600.0


@pytest.mark.parametrize("rings", ["rung", "lost"])
@pytest.mark.parametrize(
    "jobs",
    [
        pytest.param(1_000, marks=pytest.mark.once),
        pytest.param(20_000, marks=pytest.mark.chaos),
    ],
)
async def test_all_jobs_that_piled_up_run_once(
    jobs: int,
    rings: str,
    database_url: str,
    redis_url: str,
    redis: Redis,
    sessions: Sessions,
    stage: Stage,
    start: Start,
    provoked: Provoked,
) -> None:
    producer = Producer(sessions, discover_jobs(SAMPLE_JOBS), Bell(redis))
    for first in range(0, jobs, AT_A_TIME):
        numbers = range(first, first + AT_A_TIME)
        payloads: list[Payload] = [
            TakeDown(note=f"note {n}") if n % 2 else ActOut(note=f"note {n}") for n in numbers
        ]
        await producer.enqueue_many(payloads)
    if rings == "lost":
        await redis.flushall()
    settings = {"job_modules": ",".join(SAMPLE_JOBS), "log_format": "json"}
    since_s = time.monotonic()
    worker = start(environment(database_url, redis_url, **settings))

    async def all_done() -> bool:
        done = await stage.value("SELECT count(*) FROM bulwark.job WHERE state = 'succeeded'")
        return bool(done == jobs)

    await until(all_done, f"{jobs} jobs have succeeded", MOST_S)
    took_s = time.monotonic() - since_s
    notes = await stage.notes()
    losses = await check_invariants(database_url)
    provoked(
        f"No worker for a while, rings {rings}: {jobs:,} jobs wait",
        times=1,
        jobs=jobs,
        lost=jobs - len(set(notes)) + losses.lost,
        doubled=len(notes) - len(set(notes)) + losses.doubled,
        recovery_s=[took_s],
    )
    assert not losses
    assert worker.terminate() == 0
