"""Redis goes away, comes back, or says nothing any more, while workers are busy."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import pytest
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from jobs import Producer, discover_jobs
from jobs._spooling import enqueue_file
from tests.own_servers import OwnRedis
from tests.sample_jobs.act_out import ActOut
from tests.sample_jobs.write_notes import WriteNotes
from tests.stage import SAMPLE_JOBS, Stage
from tests.wire import Wire, wired
from tests.workers import Start, WorkerProcess, environment, until

pytestmark = pytest.mark.once

Sessions = async_sessionmaker[AsyncSession]
SETTINGS = {
    "job_modules": ",".join(SAMPLE_JOBS),
    "redis_timeout_s": "1",
    "relay_interval_s": "0.1",
    "shutdown_grace_s": "0.2",
    "log_format": "json",
}
RESTARTS = 10
ROWS = 60_000
SLOW_INSERTS = (
    """CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql
       AS $$ BEGIN
         PERFORM pg_sleep(0.05); -- so that Redis can die in the middle of a chunk
         RETURN NULL;
       END $$""",
    "CREATE TRIGGER dawdle AFTER INSERT ON team FOR EACH STATEMENT EXECUTE FUNCTION dawdle()",
)


@pytest.fixture
def producer(sessions: Sessions) -> Producer:
    """Leaves the ringing to the relay."""
    return Producer(sessions, discover_jobs(SAMPLE_JOBS))


class Hushed(NamedTuple):
    """A worker whose running job waits at the gate, and whose Redis says nothing any more."""

    worker: WorkerProcess
    wire: Wire
    job_id: UUID


@pytest.fixture
async def hushed(
    database_url: str, stage: Stage, redis_url: str, start: Start, producer: Producer
) -> AsyncIterator[Hushed]:
    await stage.close_gate()
    async with wired(redis_url) as (wire, url):
        patient = SETTINGS | {"redis_timeout_s": "3"}  # who is slow for a moment is not lost
        worker = start(environment(database_url, url, **patient))
        job_id = (await producer.enqueue(WriteNotes(chunks=2, gate_before=2))).job_id
        await stage.somebody_at_gate()
        wire.hush()
        yield Hushed(worker, wire, job_id)


async def until_said(worker: WorkerProcess, event: str, times: int = 1) -> None:
    async def said() -> bool:
        return worker.told().count(event) >= times

    await until(said, f"the worker has said {event} {times} times")


async def chunks(stage: Stage) -> int:
    count: int = await stage.value("SELECT count(*) FROM bulwark.chunk WHERE chunk_no > 0")
    return count


async def until_it_gets_on(stage: Stage, job_id: UUID) -> None:
    """Return when the running import has committed another chunk."""
    before = await chunks(stage)

    async def more() -> bool:
        return await chunks(stage) > before

    await until(more, "the import gets on")
    assert (await stage.row(job_id))["state"] == "running"


async def test_a_busy_worker_outlives_ten_deaths_of_redis_and_gives_nothing_back(
    database_url: str,
    stage: Stage,
    valkey: OwnRedis,
    start: Start,
    producer: Producer,
    tmp_path: Path,
) -> None:
    path = tmp_path / "teams.csv"
    path.write_text("name\n" + "".join(f"Team {n}\n" for n in range(ROWS)))
    for statement in SLOW_INSERTS:
        await stage.value(statement)
    patient = SETTINGS | {"redis_timeout_s": "30"}  # who is dead refuses; who is slow is not lost
    worker = start(environment(database_url, valkey.url, **patient))
    job_id = (await enqueue_file(producer, path, {"table": "team", "chunk_rows": 100})).job_id
    await stage.becomes(job_id, "running")
    for number in range(1, RESTARTS + 1):
        valkey.kill()
        await until_said(worker, "worker.redis_lost", number)
        await until_it_gets_on(stage, job_id)
        valkey.start()
        await until_said(worker, "worker.redis_back", number)
    await stage.value("DROP TRIGGER dawdle ON team")
    await stage.becomes(job_id, "succeeded")
    assert await stage.ended_as(job_id) == ("succeeded", None, 0)
    assert await stage.value("SELECT count(*) FROM team") == ROWS
    assert await stage.value("SELECT sum(rows) FROM bulwark.audit") == ROWS
    told = worker.told()
    assert told.count("worker.redis_lost") == told.count("worker.redis_back") == RESTARTS
    assert told.count("worker.started") == told.count("job.started") == 1
    assert "job.given_back" not in told
    assert worker.terminate() == 0


async def test_a_busy_worker_whose_redis_falls_silent_goes_on_and_hears_again(
    stage: Stage, hushed: Hushed, producer: Producer
) -> None:
    worker = hushed.worker
    await until_said(worker, "worker.redis_lost")
    await stage.open_gate()
    await stage.becomes(hushed.job_id, "succeeded")
    hushed.wire.mend()
    await until_said(worker, "worker.redis_back")
    after = (await producer.enqueue(ActOut())).job_id
    await stage.becomes(after, "succeeded")
    assert worker.told().count("worker.redis_lost") == 1
    assert await asyncio.to_thread(worker.terminate) == 0
    assert await stage.notes() == ["chunk 1", "chunk 2", "done"]


async def test_a_busy_worker_whose_redis_has_fallen_silent_ends_well(
    stage: Stage, hushed: Hushed
) -> None:
    assert await asyncio.to_thread(hushed.worker.terminate) == 0
    assert await stage.ended_as(hushed.job_id) == ("queued", "given_back", 0)


async def test_twelve_of_twelve_busy_workers_end_well_though_redis_dies_on_half_of_them(
    database_url: str, stage: Stage, valkey: OwnRedis, start: Start, producer: Producer
) -> None:
    await stage.close_gate()
    ids = [(await producer.enqueue(WriteNotes(chunks=3, gate_in=2))).job_id for _ in range(12)]
    settings = environment(database_url, valkey.url, **SETTINGS, max_jobs="1", lost_after_s="120")
    crew = [start(settings) for _ in ids]
    for number in range(1, len(ids) + 1):
        await stage.somebody_at_gate(number)
    codes = [one.terminate() for one in crew[:6]]
    valkey.kill()
    codes += [one.terminate() for one in crew[6:]]
    assert codes == [0] * len(crew)
    assert await stage.value("SELECT bool_and(end_reason = 'stopped') FROM bulwark.worker")
    for job_id in ids:
        assert await stage.ended_as(job_id) == ("queued", "given_back", 0)
    assert await stage.notes() == ["chunk 1"] * len(ids)


async def test_a_worker_outlives_a_redis_that_is_a_replica_for_a_while(
    database_url: str, stage: Stage, valkey: OwnRedis, start: Start, producer: Producer
) -> None:
    worker = start(environment(database_url, valkey.url, **SETTINGS))
    await until_said(worker, "worker.started")
    async with Redis.from_url(valkey.url) as redis:
        await redis.replicaof("127.0.0.1", "1")
        await until_said(worker, "worker.redis_lost")
        await until_said(worker, "relay.failed")

        async def tried_often() -> bool:
            return int((await redis.info("errorstats"))["errorstat_READONLY"]["count"]) > 20

        await until(tried_often, "ear and relay have tried again and again")
        await redis.replicaof("NO", "ONE")
    await until_said(worker, "worker.redis_back")
    await stage.becomes((await producer.enqueue(ActOut())).job_id, "succeeded")
    told = worker.told()
    assert told.count("worker.redis_lost") == told.count("worker.redis_back") == 1
    assert worker.terminate() == 0
