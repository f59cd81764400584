"""Bulk jobs never take all slots of a worker: what is short does not wait for their ends."""

from functools import partial

import pytest
from arq.connections import ArqRedis
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from jobs._discovery import discover_jobs
from jobs._producer import Producer
from tests.sample_jobs.act_out import ActOut
from tests.sample_jobs.write_notes import WriteNotes
from tests.stage import SAMPLE_JOBS, Stage
from tests.workers import Start, WorkerProcess, environment, until

BULK = WriteNotes(chunks=1, gate_before=1)


@pytest.fixture
def producer(sessions: async_sessionmaker[AsyncSession]) -> Producer:
    return Producer(sessions, discover_jobs(SAMPLE_JOBS))


@pytest.fixture
def settings(database_url: str, redis_url: str) -> dict[str, str]:
    return environment(
        database_url, redis_url, job_modules=",".join(SAMPLE_JOBS), log_format="json"
    )


async def test_a_flood_of_bulk_jobs_does_not_hold_up_short_ones(
    producer: Producer, settings: dict[str, str], start: Start, stage: Stage
) -> None:
    await stage.close_gate()
    bulk = await producer.enqueue_many([BULK] * 200)
    start(settings | {"BULWARK_MAX_JOBS": "5"})
    await stage.somebody_at_gate(4)

    for number in range(10):
        short = await producer.enqueue(ActOut(note=f"short {number}"))
        await stage.becomes(short.job_id, "succeeded")
    assert await stage.value("SELECT count(*) FROM bulwark.job WHERE state = 'running'") == 4

    await stage.open_gate()
    for one in bulk:
        await stage.becomes(one.job_id, "succeeded")


async def test_a_flood_of_bulk_jobs_does_not_hold_up_messages_of_plain_clients(
    producer: Producer,
    settings: dict[str, str],
    start: Start,
    stage: Stage,
    client: ArqRedis,
) -> None:
    await stage.close_gate()
    bulk = await producer.enqueue_many([BULK] * 20)
    worker = start(settings | {"BULWARK_MAX_JOBS": "5"})
    await stage.somebody_at_gate(4)

    for number in range(3):
        await client.enqueue_job("act_out", {"note": f"theirs {number}"})
        await client.enqueue_job("write_notes", {"chunks": 1, "gate_before": 1})
    await until(partial(said, worker, "message.adopted", 6), "all messages are adopted")
    await until(partial(noted, stage, 3), "the short ones are done")
    assert await stage.value("SELECT count(*) FROM bulwark.job WHERE state = 'running'") == 4

    await stage.open_gate()
    for one in bulk:
        await stage.becomes(one.job_id, "succeeded")
    await until(partial(noted, stage, 3 + 20 + 3), "the bulk jobs of the plain client are done")


async def said(worker: WorkerProcess, event: str, times: int) -> bool:
    return worker.told().count(event) == times


async def noted(stage: Stage, notes: int) -> bool:
    return len(await stage.notes()) == notes


async def test_a_bulk_job_of_normal_priority_may_have_any_slot(
    producer: Producer, settings: dict[str, str], start: Start, stage: Stage
) -> None:
    await stage.close_gate()
    await producer.enqueue_many([BULK] * 5, priority=0)
    start(settings | {"BULWARK_MAX_JOBS": "5", "BULWARK_BULK_SLOTS": "1"})

    await stage.somebody_at_gate(5)


async def test_a_worker_of_one_slot_runs_bulk_jobs_too(
    producer: Producer, settings: dict[str, str], start: Start, stage: Stage
) -> None:
    job_id = (await producer.enqueue(WriteNotes(chunks=1))).job_id
    start(settings | {"BULWARK_MAX_JOBS": "1"})

    await stage.becomes(job_id, "succeeded")
