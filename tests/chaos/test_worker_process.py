"""Real worker processes that are killed, paused, blocked and told to stop, in the midst of jobs."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import redis
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from jobs._declaration import Payload
from jobs._discovery import discover_jobs
from jobs._producer import Producer
from tests.own_servers import own_redis
from tests.sample_jobs.act_out import ActOut
from tests.sample_jobs.write_notes import WriteNotes
from tests.stage import SAMPLE_JOBS, Stage
from tests.wire import wired
from tests.workers import Start, WorkerProcess, environment, run_bulwark, run_python, until
from worker.liveness import EXIT_OVERRUN, EXIT_SILENT

Sessions = async_sessionmaker[AsyncSession]
QUICK = {
    "job_modules": ",".join(SAMPLE_JOBS),
    "beat_interval_s": "0.3",
    "lost_after_s": "1.0",
    "relay_interval_s": "0.1",
    "shutdown_grace_s": "0.2",
    "log_format": "json",
}
UNHURRIED = {"beat_interval_s": "5", "lost_after_s": "120"}
PATIENT = {"lost_after_s": "5"}
"""For workers that are not to give up each other when the machine has no time for one of them."""
THREE_CHUNKS = ["chunk 1", "chunk 2", "chunk 3"]


class Plant:
    """Workers on one database and one Redis, and jobs for them."""

    def __init__(
        self,
        start: Start,
        stage: Stage,
        sessions: Sessions,
        urls: tuple[str, str],
    ) -> None:
        self._start = start
        self._urls = urls
        self._producer = Producer(sessions, discover_jobs(SAMPLE_JOBS))
        self.stage = stage

    def settings(self, **changes: str) -> dict[str, str]:
        return environment(*self._urls, **QUICK | changes)

    def worker(self, **changes: str) -> WorkerProcess:
        return self._start(self.settings(**changes))

    async def accept(self, payload: Payload, **terms: Any) -> UUID:
        return (await self._producer.enqueue(payload, **terms)).job_id

    async def rows_of(self, pid: int) -> int:
        count: int = await self.stage.value(
            "SELECT count(*) FROM bulwark.worker WHERE pid = $1", pid
        )
        return count

    async def is_up(self, *processes: WorkerProcess) -> None:
        """Return when each has a row of its own in the ledger."""
        for process in processes:

            async def up(pid: int = process.pid) -> int:
                return await self.rows_of(pid)

            await until(up, f"the worker is up: {process.log.read_text()[-2000:]}")

    async def end_of(self, process: WorkerProcess) -> str | None:
        reason: str | None = await self.stage.value(
            "SELECT end_reason FROM bulwark.worker WHERE pid = $1", process.pid
        )
        return reason


@pytest.fixture
def plant(
    start: Start,
    stage: Stage,
    sessions: Sessions,
    database_url: str,
    redis_url: str,
) -> Plant:
    return Plant(start, stage, sessions, (database_url, redis_url))


def blocks(process: WorkerProcess, number: signal.Signals) -> bool:
    """Whether the first thread of the process lets this signal wait."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = next(line for line in status.splitlines() if line.startswith("SigBlk:")).split()[1]
    return bool(int(mask, 16) >> (number - 1) & 1)


@contextmanager
def arq_worker(env: Mapping[str, str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker that the command line of arq has started."""
    with (folder / "arq.log").open("wb") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("arq")), "worker.main.WorkerSettings"],
            env=dict(env),
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("command", ["bulwark", "arq"])
async def test_a_worker_bears_a_redis_that_is_slow_while_it_starts(
    stage: Stage,
    database_url: str,
    redis_url: str,
    start: Start,
    tmp_path: Path,
    command: str,
) -> None:
    timeout_s = 0.2
    async with wired(redis_url) as (wire, way):
        wire.hold()
        env = environment(database_url, way, **QUICK, redis_timeout_s=f"{timeout_s}")
        with ExitStack() as stack:
            if command == "arq":
                stack.enter_context(arq_worker(env, tmp_path))
            else:
                start(env)
            await asyncio.wait_for(wire.asked.wait(), 60)
            overdue_s = time.monotonic() + 5 * timeout_s

            async def overdue() -> bool:
                return time.monotonic() > overdue_s

            await until(overdue, "the answer is overdue")
            wire.release()

            async def is_up() -> bool:
                return bool(await stage.value("SELECT count(*) FROM bulwark.worker"))

            await until(is_up, "the worker has started")


async def test_a_worker_killed_between_effect_and_commit_leaves_nothing_of_it(
    plant: Plant, stage: Stage
) -> None:
    first = plant.worker()
    await stage.close_gate()
    job_id = await plant.accept(ActOut(gate=True))
    await stage.somebody_at_gate()
    first.kill()
    plant.worker()

    async def rescued() -> bool:
        return bool((await stage.row(job_id))["crashes"] == 1)

    await until(rescued, "the killed worker's job is taken back")
    assert await stage.notes() == []
    await stage.somebody_at_gate()
    await stage.open_gate()
    await stage.becomes(job_id, "succeeded")
    assert await stage.ended_as(job_id) == ("succeeded", None, 0)
    assert await stage.notes() == ["done"]


async def test_a_job_that_blocks_the_event_loop_does_not_make_its_worker_look_dead(
    plant: Plant, stage: Stage
) -> None:
    one, other = plant.worker(**PATIENT), plant.worker(**PATIENT)
    await plant.is_up(one, other)
    job_id = await plant.accept(ActOut(then="block", seconds=8))
    row = await stage.becomes(job_id, "succeeded")
    assert row["crashes"] == 0
    assert await stage.notes() == ["done"]
    assert [await plant.end_of(one), await plant.end_of(other)] == [None, None]


async def test_a_job_that_blocks_the_event_loop_is_told_with_the_place(
    plant: Plant, stage: Stage
) -> None:
    worker = plant.worker()
    await stage.becomes(await plant.accept(ActOut(then="block", seconds=3)), "succeeded")

    async def told() -> list[dict[str, Any]]:
        told = [line for line in worker.events() if "blocked" in line["event"]]
        return told if told[-1:] and told[-1]["event"] == "worker.unblocked" else []

    blocked, unblocked = await until(told, "the worker says that its loop is free again")
    assert "time.sleep(payload.seconds)" in blocked["stack"]
    assert unblocked["after_s"] >= blocked["for_s"] >= 1.0


async def test_a_job_that_takes_longer_than_many_beats_stays_with_its_worker(
    plant: Plant, stage: Stage
) -> None:
    one, other = plant.worker(**PATIENT), plant.worker(**PATIENT)
    await plant.is_up(one, other)
    await stage.close_gate()
    job_id = await plant.accept(WriteNotes(chunks=2, gate_before=2))
    await stage.somebody_at_gate()
    before = await stage.row(job_id)

    async def beaten() -> Any:
        return await stage.value(
            "SELECT bool_and(seen_at > $1::timestamptz + interval '8 s') FROM bulwark.worker",
            before["claimed_at"],
        )

    await until(beaten, "both workers have beaten many times")
    assert await stage.row(job_id) == before
    await stage.open_gate()
    await stage.becomes(job_id, "succeeded")
    assert await stage.notes() == ["chunk 1", "chunk 2"]


async def test_a_job_that_blocks_beyond_its_limit_ends_its_process(
    plant: Plant, stage: Stage, tmp_path: Path
) -> None:
    job_id = await plant.accept(ActOut(then="block", seconds=600), timeout_s=1)
    code = (
        "from worker import liveness, main, settings; liveness.OVERRUN_GRACE_S = 0.5;"
        "main.run_worker(settings.load_settings())"
    )
    ended = await asyncio.to_thread(run_python, "-c", code, env=plant.settings(), folder=tmp_path)
    assert ended.returncode == EXIT_OVERRUN
    assert '"worker.overrun"' in ended.stderr
    assert (await stage.row(job_id))["state"] == "running"
    assert await stage.notes() == []


async def test_a_job_that_kills_its_workers_is_poisoned_and_the_next_worker_lives(
    plant: Plant, stage: Stage
) -> None:
    crew = [plant.worker(**PATIENT) for _ in range(4)]
    await plant.is_up(*crew)
    job_id = await plant.accept(WriteNotes(chunks=1, die_at=1))
    row = await stage.becomes(job_id, "failed")
    assert (row["reason"], row["crashes"], row["attempt"]) == ("poisoned", 3, 0)
    assert [one.running for one in crew].count(True) == 1
    healthy = await plant.accept(ActOut())
    await stage.becomes(healthy, "succeeded")


async def test_a_paused_worker_that_wakes_changes_nothing_and_goes_on_afresh(
    plant: Plant, stage: Stage
) -> None:
    paused = plant.worker(**PATIENT)
    await stage.close_gate()
    job_id = await plant.accept(WriteNotes(chunks=3, gate_in=2))
    await stage.somebody_at_gate()
    paused.signal(signal.SIGSTOP)
    other = plant.worker()

    async def lost() -> bool:
        return await plant.end_of(paused) == "lost"

    await until(lost, "the paused worker is declared lost")
    await stage.open_gate()
    await stage.becomes(job_id, "succeeded")
    before = await stage.row(job_id)
    assert await stage.notes() == THREE_CHUNKS
    paused.signal(signal.SIGCONT)

    async def anew() -> bool:
        return await plant.rows_of(paused.pid) == 2

    await until(anew, "the process has started anew")
    assert other.terminate() == 0
    await stage.becomes(await plant.accept(ActOut()), "succeeded")
    assert await stage.notes() == [*THREE_CHUNKS, "done"]
    assert await stage.row(job_id) == before
    assert paused.terminate() == 0


async def test_a_worker_told_to_stop_while_it_starts_anew_ends_well(
    plant: Plant, stage: Stage
) -> None:
    worker = plant.worker()
    await plant.is_up(worker)
    await stage.execute("UPDATE bulwark.worker SET ended_at = now(), end_reason = 'lost'")

    async def starts_anew() -> bool:
        return blocks(worker, signal.SIGTERM)

    await until(starts_anew, "the process starts anew")
    assert worker.terminate() == 0


async def test_a_busy_worker_told_to_stop_hands_its_job_to_another_at_once(
    plant: Plant, stage: Stage
) -> None:
    first = plant.worker(**UNHURRIED)
    await stage.close_gate()
    job_id = await plant.accept(WriteNotes(chunks=3, gate_in=2))
    await stage.somebody_at_gate()
    second = plant.worker(**UNHURRIED)
    await plant.is_up(second)
    assert first.terminate() == 0
    assert "job.given_back" in first.told()
    await stage.somebody_at_gate()
    assert await stage.notes() == ["chunk 1"]
    await stage.open_gate()
    row = await stage.becomes(job_id, "succeeded")
    assert (row["attempt"], row["crashes"]) == (0, 0)
    assert await stage.notes() == THREE_CHUNKS


async def test_five_busy_workers_told_to_stop_all_end_well(plant: Plant, stage: Stage) -> None:
    await stage.close_gate()
    ids = [await plant.accept(WriteNotes(chunks=3, gate_in=2)) for _ in range(5)]
    crew = [plant.worker(max_jobs="1", **UNHURRIED) for _ in ids]
    await stage.somebody_at_gate(len(ids))
    assert [one.terminate() for one in crew] == [0] * len(crew)
    assert [await plant.end_of(one) for one in crew] == ["stopped"] * len(crew)
    for job_id in ids:
        assert await stage.ended_as(job_id) == ("queued", "given_back", 0)
    await stage.open_gate()
    plant.worker()
    for job_id in ids:
        row = await stage.becomes(job_id, "succeeded")
        assert (row["attempt"], row["crashes"]) == (0, 0)
    assert sorted(await stage.notes()) == sorted(THREE_CHUNKS * len(ids))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_idle_worker_told_to_stop_ends_well(plant: Plant, number: signal.Signals) -> None:
    idle = plant.worker()
    await plant.is_up(idle)
    idle.signal(number)
    assert idle.terminate() == 0
    assert await plant.end_of(idle) == "stopped"


async def test_one_process_serves_several_queues_and_gives_all_their_jobs_back(
    plant: Plant, stage: Stage
) -> None:
    await stage.close_gate()
    both = plant.worker(queues="default,bulk")
    ids = [
        await plant.accept(WriteNotes(chunks=3, gate_in=2), queue=queue)
        for queue in ("default", "bulk")
    ]
    await stage.somebody_at_gate(2)
    elsewhere = await plant.accept(ActOut(), queue="other")
    assert both.terminate() == 0
    for job_id in ids:
        assert await stage.ended_as(job_id) == ("queued", "given_back", 0)
    await stage.open_gate()
    plant.worker(queues="bulk,default")
    for job_id in ids:
        await stage.becomes(job_id, "succeeded")
    assert sorted(await stage.notes()) == sorted(THREE_CHUNKS * 2)
    assert (await stage.row(elsewhere))["state"] == "queued"


async def test_the_command_of_arq_starts_a_full_worker(
    plant: Plant, stage: Stage, tmp_path: Path
) -> None:
    with arq_worker(plant.settings(), tmp_path) as process:
        await stage.becomes(await plant.accept(ActOut()), "succeeded")
        process.terminate()
        assert await asyncio.to_thread(process.wait, 30) == 0
    assert await stage.value("SELECT end_reason FROM bulwark.worker") == "stopped"


async def test_the_command_of_arq_gives_its_job_back_though_redis_is_gone(
    stage: Stage, sessions: Sessions, database_url: str, tmp_path: Path
) -> None:
    producer = Producer(sessions, discover_jobs(SAMPLE_JOBS))
    with own_redis() as valkey:
        await stage.close_gate()
        job_id = (await producer.enqueue(WriteNotes(chunks=2, gate_before=2))).job_id
        with arq_worker(environment(database_url, valkey.url, **QUICK), tmp_path) as process:
            await stage.somebody_at_gate()
            valkey.kill()
            process.terminate()
            assert await asyncio.to_thread(process.wait, 30) == 0
    assert await stage.ended_as(job_id) == ("queued", "given_back", 0)


def refusal(settings: dict[str, str], folder: Path) -> str:
    """What `bulwark worker` says when it refuses: one sentence after its log."""
    ended = run_bulwark("worker", env=settings, folder=folder)
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr
    told = [line for line in ended.stderr.splitlines() if line.startswith("bulwark: ")]
    assert len(told) == 1
    assert ended.stderr.splitlines()[-1] == told[0]
    return told[0]


async def test_a_worker_refuses_a_database_that_is_not_at_head(
    plant: Plant, stage: Stage, tmp_path: Path
) -> None:
    await stage.value("UPDATE alembic_version SET version_num = '0001'")
    said = refusal(plant.settings(), tmp_path)
    assert "0001" in said
    assert "bulwark migrate" in said
    assert await stage.value("SELECT count(*) FROM bulwark.worker") == 0


def test_a_worker_refuses_without_postgresql(redis_url: str, tmp_path: Path) -> None:
    nowhere = f"postgresql://u:geheim@/none?host={tmp_path}"
    said = refusal(environment(nowhere, redis_url), tmp_path)
    assert "PostgreSQL" in said
    assert "geheim" not in said


def test_a_worker_refuses_without_redis(database_url: str, tmp_path: Path) -> None:
    said = refusal(environment(database_url, "redis://127.0.0.1:1/0"), tmp_path)
    assert "Redis" in said


def test_a_worker_refuses_a_redis_that_may_evict(database_url: str, tmp_path: Path) -> None:
    with own_redis() as valkey:
        with redis.Redis.from_url(valkey.url) as client:
            client.config_set("maxmemory", "100mb")
            client.config_set("maxmemory-policy", "allkeys-lru")
        said = refusal(environment(database_url, valkey.url), tmp_path)
    assert "noeviction" in said


def test_a_process_whose_beat_breaks_ends_rather_than_work_on_in_vain(tmp_path: Path) -> None:
    code = """if True:
        import asyncio, uuid
        from worker.liveness import Liveness
        def broken():
            raise ZeroDivisionError
        async def work():
            Liveness(uuid.uuid4(), broken, 0.1).start()
            await asyncio.Event().wait()
        asyncio.run(asyncio.wait_for(work(), 20))
    """
    ended = run_python("-c", code, env=environment("", ""), folder=tmp_path)
    assert ended.returncode == EXIT_SILENT
    assert "worker.silent" in ended.stdout
    assert "ZeroDivisionError" in ended.stdout
