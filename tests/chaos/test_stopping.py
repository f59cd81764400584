"""Workers told to stop end in time and with 0, whatever the servers do and however often told."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from db.migrations import upgrade
from jobs import Producer, discover_jobs
from tests.own_servers import OwnPostgres, frozen, own_postgres
from tests.sample_jobs.act_out import ActOut
from tests.sample_jobs.write_notes import WriteNotes
from tests.stage import SAMPLE_JOBS, Stage, stage_on
from tests.workers import ROOT, Start, WorkerProcess, environment, until

pytestmark = pytest.mark.once

NOWHERE = "postgresql://postgres@/postgres?host=/nonexistent&port=5432"
NO_REDIS = "redis://127.0.0.1:1/0"
GRACE_S = 1.0
GIVING_BACK_S = 7.0
MARGIN_S = 10.0
SETTINGS = {
    "job_modules": ",".join(SAMPLE_JOBS),
    "beat_interval_s": "1",
    "relay_interval_s": "0.1",
    "shutdown_grace_s": str(GRACE_S),
    "log_format": "json",
}


@pytest.fixture
def postgres() -> Iterator[OwnPostgres]:
    """One of the test's own, to be frozen."""
    with own_postgres() as postgres:
        upgrade(postgres.url)
        yield postgres


@pytest.fixture
async def its_stage(postgres: OwnPostgres) -> AsyncIterator[Stage]:
    async with stage_on(postgres.url) as stage:
        yield stage


async def until_said(worker: WorkerProcess, event: str) -> None:
    async def said() -> bool:
        return event in worker.told()

    await until(said, f"the worker has said {event}")


async def accept(postgres: OwnPostgres, payload: WriteNotes) -> None:
    engine = create_async_engine(postgres.url)
    await Producer(async_sessionmaker(engine), discover_jobs(SAMPLE_JOBS)).enqueue(payload)
    await engine.dispose()


@pytest.mark.parametrize("busy", [False, True])
async def test_a_worker_whose_postgresql_is_frozen_ends_in_time(
    postgres: OwnPostgres,
    its_stage: Stage,
    redis_url: str,
    start: Start,
    *,
    busy: bool,
) -> None:
    worker = start(environment(postgres.url, redis_url, **SETTINGS))
    await until_said(worker, "worker.started")
    if busy:
        await its_stage.close_gate()
        await accept(postgres, WriteNotes(chunks=2, gate_before=2))
        await its_stage.somebody_at_gate()
    with frozen(postgres):
        await until_said(worker, "beat.missed")
        told_s = time.monotonic()
        assert await asyncio.to_thread(worker.terminate, 60) == 0
        assert time.monotonic() - told_s < GRACE_S + GIVING_BACK_S + MARGIN_S


async def test_workers_told_to_stop_again_and_again_end_with_0(
    database_url: str, redis_url: str, start: Start
) -> None:
    crew = [start(environment(database_url, redis_url, **SETTINGS)) for _ in range(3)]
    for one in crew:
        await until_said(one, "worker.started")

    async def ended() -> bool:
        for one in crew:
            one.signal(signal.SIGTERM)
        return not any(one.running for one in crew)

    await until(ended, "the workers have ended")
    assert [one.terminate() for one in crew] == [0] * len(crew)


async def test_a_chunked_job_stops_at_its_next_chunk_while_a_short_one_may_end(
    database_url: str,
    redis_url: str,
    stage: Stage,
    sessions: async_sessionmaker[AsyncSession],
    start: Start,
) -> None:
    env = environment(database_url, redis_url, **SETTINGS | {"shutdown_grace_s": "600"})
    busy = start(env)
    await stage.close_gate()
    producer = Producer(sessions, discover_jobs(SAMPLE_JOBS))
    chunked = (await producer.enqueue(WriteNotes(chunks=3, gate_in=2))).job_id
    short = (await producer.enqueue(ActOut(gate=True))).job_id
    await stage.somebody_at_gate(2)
    busy.signal(signal.SIGTERM)
    await until_said(busy, "worker.stopping")
    other = start(env)
    await until_said(other, "worker.started")

    await stage.open_gate()

    for job_id in (chunked, short):
        row = await stage.becomes(job_id, "succeeded")
        assert (row["attempt"], row["crashes"]) == (0, 0)
    assert await asyncio.to_thread(busy.terminate, 60) == 0
    ends = {line["event"]: line.get("kind") for line in busy.events()}
    assert (ends["job.given_back"], ends["job.succeeded"]) == ("write_notes", "act_out")
    assert [line["chunk"] for line in busy.events() if line["event"] == "chunk.committed"] == [1, 2]
    assert sorted(await stage.notes()) == ["chunk 1", "chunk 2", "chunk 3", "done"]


async def test_a_second_signal_ends_a_busy_worker_at_once_and_its_job_goes_on_elsewhere(
    database_url: str,
    redis_url: str,
    stage: Stage,
    sessions: async_sessionmaker[AsyncSession],
    start: Start,
) -> None:
    env = environment(database_url, redis_url, **SETTINGS | {"shutdown_grace_s": "600"})
    busy = start(env)
    await stage.close_gate()
    producer = Producer(sessions, discover_jobs(SAMPLE_JOBS))
    job_id = (await producer.enqueue(WriteNotes(chunks=3, gate_in=2))).job_id
    await stage.somebody_at_gate()
    busy.signal(signal.SIGTERM)
    await until_said(busy, "worker.stopping")
    assert (busy.running, (await stage.row(job_id))["state"]) == (True, "running")

    told_s = time.monotonic()
    assert await asyncio.to_thread(busy.terminate, 60) == 0

    assert time.monotonic() - told_s < GIVING_BACK_S + MARGIN_S
    assert await stage.ended_as(job_id) == ("queued", "given_back", 0)
    assert await stage.notes() == ["chunk 1"]
    await stage.open_gate()
    start(env)
    row = await stage.becomes(job_id, "succeeded")
    assert (row["attempt"], row["crashes"]) == (0, 0)
    assert await stage.notes() == ["chunk 1", "chunk 2", "chunk 3"]


async def test_a_worker_told_to_stop_while_it_starts_ends_at_once_with_0(tmp_path: Path) -> None:
    (tmp_path / "slow_jobs.py").write_text(
        "import signal\nfrom pathlib import Path\n\nPath('reached').touch()\nsignal.pause()\n"
    )
    env = environment(NOWHERE, NO_REDIS, job_modules="slow_jobs")
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "worker", "worker"),
        env={**env, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
    )

    async def reached() -> bool:
        return (tmp_path / "reached").exists()

    await until(reached, "the worker is finding its jobs")
    worker.terminate()
    _, said = await asyncio.wait_for(worker.communicate(), timeout=30)

    assert (worker.returncode, said) == (0, b"")
