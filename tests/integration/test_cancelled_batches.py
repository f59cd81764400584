"""A job that is cancelled while it is done together with others goes no further, and they do."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from structlog.testing import capture_logs

from db.engine import PoolProfile, create_engine, make_sessions
from db.ledger.cancellation import cancel
from db.transaction import transaction
from jobs._discovery import discover_jobs
from tests.inprocess import Bench
from tests.proxy import BREAKS, Cut, proxied
from tests.sample_jobs.take_down import TakeDown
from tests.stage import SAMPLE_JOBS, Stage
from tests.workers import until
from worker.cancelling import Canceller
from worker.executor import Executor

FENCE = b"FOR SHARE OF job"
SUCCEEDED = ("succeeded", None, 0)
CANCELLED = ("cancelled", None, 0)
GIVEN_BACK = ("queued", "given_back", 0)


async def accept(bench: Bench, *payloads: TakeDown, **terms: Any) -> list[UUID]:
    return [one.job_id for one in await bench.producer.enqueue_many(payloads, **terms)]


async def cancel_all(bench: Bench, *job_ids: UUID, at_once: bool = False) -> list[str]:
    """What each cancellation was answered."""

    async def ask(session: AsyncSession) -> list[str]:
        return [await cancel(session, job_id, "Zoë", at_once=at_once) for job_id in job_ids]

    return await transaction(bench.sessions, ask, name="test", receipted=True)


async def ends(stage: Stage, job_ids: Sequence[UUID]) -> list[tuple[str, str | None, int]]:
    return [await stage.ended_as(job_id) for job_id in job_ids]


async def together(stage: Stage, job_id: UUID) -> int:
    """With how many the job was done."""
    number: int = json.loads((await stage.row(job_id))["outcome"])["together"]
    return number


def begin(executor: Executor, job_id: UUID) -> asyncio.Task[None]:
    return asyncio.create_task(executor.deliver(job_id, "take_down"))


@asynccontextmanager
async def cancelling(bench: Bench, executor: Executor) -> AsyncIterator[None]:
    """Let the executor's jobs be stopped at once, as in a worker."""
    task = asyncio.create_task(Canceller(bench.sessions, executor.running).run_forever())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def through_proxy(url: str) -> AsyncIterator[tuple[Any, Bench]]:
    """A bench whose connections all go through a proxy that can cut them, or hold them up."""
    async with proxied(url) as (proxy, proxied_url):
        engine = create_engine(
            proxied_url, profile=PoolProfile.LIGHT, application_name="test_cancelled_batches"
        )
        yield proxy, Bench(make_sessions(engine), proxied_url, discover_jobs(SAMPLE_JOBS))
        await engine.dispose()


async def test_a_job_that_is_cancelled_before_the_fence_is_left_out_and_ended(
    stage: Stage, bench: Bench, database_url: str
) -> None:
    async with through_proxy(database_url) as (proxy, far):
        executor = await far.register()
        job_ids = await accept(far, *(TakeDown(note=note) for note in "abc"))
        proxy.hold(FENCE)
        delivery = begin(executor, job_ids[0])
        await proxy.holds.wait()
        assert await cancel_all(bench, job_ids[1]) == ["running"]
        proxy.release()
        with capture_logs() as logs:
            await delivery
    assert await ends(stage, job_ids) == [SUCCEEDED, CANCELLED, SUCCEEDED]
    assert await together(stage, job_ids[0]) == await together(stage, job_ids[2]) == 2
    assert await stage.notes() == ["a", "c"]
    assert "batch.failed" not in {line["event"] for line in logs}


async def test_a_batch_whose_jobs_are_all_cancelled_changes_nothing(
    stage: Stage, bench: Bench, database_url: str
) -> None:
    async with through_proxy(database_url) as (proxy, far):
        executor = await far.register()
        job_ids = await accept(far, *(TakeDown(note=note) for note in "abc"))
        proxy.hold(FENCE)
        delivery = begin(executor, job_ids[0])
        await proxy.holds.wait()
        await cancel_all(bench, *job_ids)
        proxy.release()
        await delivery
    assert await ends(stage, job_ids) == [CANCELLED] * 3
    assert await stage.notes() == []


async def test_jobs_that_are_to_stop_at_once_end_before_the_others_are_done_one_by_one(
    stage: Stage, bench: Bench
) -> None:
    executor = await bench.register()
    orders = [TakeDown(note="a", gate=True), *(TakeDown(note=note) for note in "bcd")]
    job_ids = await accept(bench, *orders, timeout_s=600)
    await stage.close_gate()
    delivery = begin(executor, job_ids[0])
    await stage.somebody_at_gate()
    with capture_logs() as logs:
        async with cancelling(bench, executor):
            await cancel_all(bench, job_ids[1], job_ids[3], at_once=True)
            for job_id in (job_ids[1], job_ids[3]):
                await stage.becomes(job_id, "cancelled")
            assert await ends(stage, [job_ids[2]]) == [("running", None, 0)], "'a' is at the gate"
            await stage.open_gate()
            await delivery
    assert await ends(stage, job_ids) == [SUCCEEDED, CANCELLED, SUCCEEDED, CANCELLED]
    assert await together(stage, job_ids[0]) == await together(stage, job_ids[2]) == 1
    assert await stage.notes() == ["a", "c"]
    assert [line["jobs"] for line in logs if line["event"] == "batch.failed"] == [4]
    assert executor.running.claims == []
    assert not executor.liveness._deadlines


async def test_a_job_that_runs_by_itself_after_that_is_stopped_at_once_as_well(
    stage: Stage, bench: Bench
) -> None:
    executor = await bench.register()
    orders = [TakeDown(note="a", then="hang"), TakeDown(note="b"), TakeDown(note="c")]
    job_ids = await accept(bench, *orders, timeout_s=600)
    delivery = begin(executor, job_ids[0])
    async with cancelling(bench, executor):
        for job_id in (job_ids[1], job_ids[0]):
            await stage.becomes(job_id, "running")
            await cancel_all(bench, job_id, at_once=True)
            await stage.becomes(job_id, "cancelled")
        await delivery
    assert await ends(stage, job_ids) == [CANCELLED, CANCELLED, SUCCEEDED]
    assert await stage.notes() == ["c"]


async def test_a_batch_is_given_back_when_its_worker_stops_while_it_is_being_cancelled(
    stage: Stage, bench: Bench
) -> None:
    executor = await bench.register()
    job_ids = await accept(bench, TakeDown(note="a", gate=True), TakeDown(note="b"))
    await stage.close_gate()
    delivery = begin(executor, job_ids[0])
    await stage.somebody_at_gate()
    await cancel_all(bench, job_ids[1], at_once=True)
    for claim_id in executor.running.claims:
        executor.running.stop(claim_id)
    executor.stop()
    await asyncio.wait([delivery])
    await executor.settle()
    assert delivery.cancelled()
    assert await ends(stage, job_ids) == [GIVEN_BACK, GIVEN_BACK]
    await stage.open_gate()
    await bench.run_jobs()
    assert await ends(stage, job_ids) == [SUCCEEDED, CANCELLED]
    assert await stage.notes() == ["a"]


async def test_a_cancelled_batch_still_obeys_the_time_limits_of_its_jobs(
    stage: Stage, bench: Bench
) -> None:
    executor = await bench.register()
    job_ids = await accept(bench, TakeDown(note="a", then="hang"), TakeDown(note="b"), timeout_s=2)
    await stage.close_gate()
    delivery = begin(executor, job_ids[0])
    await stage.becomes(job_ids[1], "running")
    async with cancelling(bench, executor):
        await cancel_all(bench, job_ids[1], at_once=True)
        await asyncio.wait_for(delivery, 30)
    assert await ends(stage, job_ids) == [("queued", "timed_out", 1), CANCELLED]


async def first_has_ended(stage: Stage) -> bool:
    """Whether no try has a lock; the next one stands before its fence."""
    sql = "SELECT count(*) = 0 FROM pg_locks WHERE relation = 'bulwark.job'::regclass AND pid <> $1"
    return bool(await stage.value(sql, await stage.value("SELECT pg_backend_pid()")))


@pytest.mark.parametrize("cut", BREAKS)
async def test_a_commit_without_an_answer_counts_for_jobs_that_are_cancelled_then(
    stage: Stage, bench: Bench, database_url: str, cut: Cut
) -> None:
    """One job was left out by the fence, another is cancelled before the batch is tried again."""
    async with through_proxy(database_url) as (proxy, far):
        executor = await far.register()
        job_ids = await accept(far, *(TakeDown(note=note, gate=note == "a") for note in "abc"))
        await stage.close_gate()
        proxy.hold(FENCE)
        delivery = begin(executor, job_ids[0])
        await proxy.holds.wait()
        await cancel_all(bench, job_ids[1])
        proxy.release()
        await stage.somebody_at_gate()
        proxy.hold(FENCE)
        proxy.arm(cut)
        await stage.open_gate()
        await proxy.holds.wait()
        await until(lambda: first_has_ended(stage), "the first try has ended in PostgreSQL, too")
        committed = bool(await stage.notes())
        [told] = await cancel_all(bench, job_ids[2])
        proxy.release()
        await delivery
        assert proxy.cuts == [cut]
    assert (told == "succeeded") == committed == (cut is not Cut.QUESTION)
    last = SUCCEEDED if committed else CANCELLED
    assert await ends(stage, job_ids) == [SUCCEEDED, CANCELLED, last]
    assert await stage.notes() == (["a", "c"] if committed else ["a"])
