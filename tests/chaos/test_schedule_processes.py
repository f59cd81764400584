"""Worker processes and schedules: strange clocks, kills, and PostgreSQL's judgement."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest
from redis.asyncio import Redis

from tests.clocks import off_by
from tests.stage import Stage
from tests.wire import wired
from tests.workers import Start, WorkerProcess, environment, until

pytestmark = pytest.mark.once

SETTINGS: Mapping[str, str] = {
    "job_modules": "tests.sample_jobs.keep_watch",
    "relay_interval_s": "0.1",
    "redis_timeout_s": "1",
    "shutdown_grace_s": "0.2",
    "log_format": "json",
}
NO_MORE_SLOTS = json.dumps({"watch": {"enabled": False}, "vigil": {"enabled": False}})


async def until_slots(stage: Stage, least: int, outcome: str = "fired") -> None:
    async def enough() -> bool:
        count = await stage.value(
            "SELECT count(*) FROM bulwark.slot WHERE outcome = $1 AND schedule = 'watch'", outcome
        )
        return bool(count >= least)

    await until(enough, f"{least} slots are {outcome}")


def told_time_s(worker: WorkerProcess) -> float:
    """By how much the worker's own clock is ahead when it writes its first line."""
    started = datetime.fromisoformat(worker.events()[0]["timestamp"])
    return (started - datetime.now(UTC)).total_seconds()


@pytest.mark.parametrize("off_s", [-65, 65])
async def test_a_worker_whose_clock_is_wrong_fires_when_it_is_time_by_postgresql(
    stage: Stage, database_url: str, redis_url: str, start: Start, tmp_path: Path, off_s: int
) -> None:
    before = await stage.value("SELECT clock_timestamp()")
    env = environment(database_url, redis_url, **SETTINGS)
    worker = start(off_by(off_s, env, tmp_path))
    await until_slots(stage, 3)

    assert abs(told_time_s(worker) - off_s) < 30
    first, late = await stage.value(
        "SELECT (min(slot.at), max(abs(extract(epoch FROM job.created_at - slot.at)))::float8) "
        "FROM bulwark.slot AS slot JOIN bulwark.job AS job ON job.id = slot.job_id"
    )
    assert first > before
    assert late < 30
    assert await stage.value(
        "SELECT bool_and(created_at >= at) FROM bulwark.job, bulwark.slot "
        "WHERE job.id = slot.job_id"
    )


async def test_two_workers_of_which_one_has_a_wrong_clock_fire_each_slot_once(
    stage: Stage, database_url: str, redis_url: str, start: Start, tmp_path: Path
) -> None:
    env = environment(database_url, redis_url, **SETTINGS)
    start(off_by(65, env, tmp_path))
    start(env)
    await until_slots(stage, 4)

    counts = await stage.value(
        "SELECT (count(*), count(DISTINCT job_id), count(DISTINCT at), "
        "extract(epoch FROM max(at) - min(at))::int + 1) FROM bulwark.slot"
    )
    assert len({*counts}) == 1
    jobs = await stage.value("SELECT count(*) FROM bulwark.job")
    assert jobs >= counts[0]


async def test_a_worker_killed_between_the_slot_and_the_ring_leaves_the_ring_to_a_relay(
    stage: Stage, database_url: str, redis_url: str, start: Start
) -> None:
    async with wired(redis_url) as (wire, url):
        worker = start(environment(database_url, url, **SETTINGS))
        await until_slots(stage, 1)
        wire.hush()
        job_id = await made_after(stage, await stage.value("SELECT clock_timestamp()"))
        worker.kill()
    async with Redis.from_url(redis_url) as redis:
        assert await redis.exists(f"arq:job:{job_id}:1") == 0
    assert (await stage.row(job_id))["ring"] == 1
    start(environment(database_url, redis_url, **SETTINGS, schedules=NO_MORE_SLOTS))
    await stage.make_due(job_id)
    assert (await stage.becomes(job_id, "succeeded"))["ring"] == 2


async def made_after(stage: Stage, instant: datetime) -> UUID:
    """A job of a slot that comes after this moment, as soon as it is there."""

    async def made() -> UUID | None:
        job_id: UUID | None = await stage.value(
            "SELECT job_id FROM bulwark.slot WHERE at > $1 ORDER BY at LIMIT 1", instant
        )
        return job_id

    return await until(made, "another slot is fired")


async def test_a_worker_that_was_killed_is_made_up_for_when_the_next_one_starts(
    stage: Stage, database_url: str, redis_url: str, start: Start
) -> None:
    env = environment(database_url, redis_url, **SETTINGS)
    first = start(env)
    await until_slots(stage, 2)
    first.kill()
    await stage.value("UPDATE bulwark.schedule SET watermark = watermark - interval '1 min'")
    await stage.value("DELETE FROM bulwark.slot")
    start(env)
    await until_slots(stage, 60)
    assert await stage.value(
        "SELECT count(*) = extract(epoch FROM max(at) - min(at)) + 1 FROM bulwark.slot"
    )
