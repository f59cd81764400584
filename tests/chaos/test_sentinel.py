"""A worker and producers behind Sentinel, whose master dies and comes back."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from jobs import Producer, discover_jobs
from jobs._bell import Bell
from tests.sample_jobs.act_out import ActOut
from tests.sample_jobs.write_notes import WriteNotes
from tests.sentinels import SENTINELS, Fleet, sentinel_fleet
from tests.stage import SAMPLE_JOBS, Stage
from tests.workers import Start, WorkerProcess, environment, run_bulwark, until
from worker.exit_codes import ExitCode
from worker.redis_pool import make_redis

pytestmark = pytest.mark.once
SETTINGS = {
    "job_modules": ",".join(SAMPLE_JOBS),
    "redis_timeout_s": "1",
    "shutdown_grace_s": "0.2",
    "log_format": "json",
}
JOBS = 20


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with sentinel_fleet(tmp_path) as fleet:
        yield fleet


@pytest.fixture
def env(database_url: str, fleet: Fleet) -> dict[str, str]:
    return environment(database_url, fleet.url, **SETTINGS)


def times_back(worker: WorkerProcess) -> int:
    return worker.told().count("worker.redis_back")


async def test_a_worker_follows_the_master_there_and_back_and_every_job_ends_once(
    fleet: Fleet,
    env: dict[str, str],
    start: Start,
    stage: Stage,
    sessions: async_sessionmaker[AsyncSession],
) -> None:
    worker = start(env)
    await stage.close_gate()
    async with make_redis(fleet.url, 1.0) as redis:
        producer = Producer(sessions, discover_jobs(SAMPLE_JOBS), Bell(redis))
        running = (await producer.enqueue(WriteNotes(chunks=3, gate_in=2))).job_id
        await stage.somebody_at_gate()
        ids = []
        for dies, takes_over in ((fleet.first, fleet.second), (fleet.second, fleet.first)):
            dies.kill()
            ids += [
                (await producer.enqueue(ActOut(note=f"{dies.port}"))).job_id for _ in range(JOBS)
            ]
            takes_over.becomes_master()
            ids += [
                (await producer.enqueue(ActOut(note=f"{dies.port}"))).job_id for _ in range(JOBS)
            ]
            for job_id in ids:
                await stage.becomes(job_id, "succeeded")
            fleet.begin_anew_as_replica(dies)
    assert (await stage.row(running))["state"] == "running"
    await stage.open_gate()
    await stage.becomes(running, "succeeded")
    assert len(await stage.notes()) == 3 + 4 * JOBS
    assert await stage.value("SELECT max(attempt + crashes) FROM bulwark.job") == 0

    async def told() -> bool:
        return times_back(worker) >= 2

    await until(told, "the worker has said twice that Redis is back")
    assert worker.terminate() == 0


def test_the_command_line_finds_the_master_though_the_first_sentinel_is_dead(
    fleet: Fleet, env: dict[str, str], tmp_path: Path
) -> None:
    fleet.kill_a_sentinel()
    told = run_bulwark("health", env=env, folder=tmp_path)
    assert told.stdout.splitlines()[0] == "not healthy"
    assert "Redis" not in told.stdout


def test_no_sentinel_that_answers_is_one_sentence_without_a_password(
    fleet: Fleet, env: dict[str, str], tmp_path: Path
) -> None:
    fleet.kill()
    told = run_bulwark("worker", env=env, folder=tmp_path)
    assert told.returncode == ExitCode.UNREACHABLE
    assert "Redis cannot be used: No master found for 'mymaster'" in told.stderr
    assert told.stderr.count("Connect call failed") >= SENTINELS
    assert "<redis" not in told.stderr
    assert "of%20" not in told.stderr
    assert "of data" not in told.stderr
    assert "Traceback" not in told.stderr
