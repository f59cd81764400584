"""Messages that were parked as of an unknown job wait for a worker that knows it."""

import asyncio
import tracemalloc
from collections.abc import Sequence
from typing import Any

import pytest
from arq.connections import ArqRedis
from structlog.testing import capture_logs

from jobs import discover_jobs
from tests.arq_side import hearing
from tests.inprocess import Bench
from tests.stage import SAMPLE_JOBS, Stage
from tests.workers import until
from worker import adopting
from worker import gleaner as gleaner_module
from worker.adopting import MAX_MESSAGE_BYTES, adopt_known
from worker.delivery import Delivery
from worker.gleaner import Gleaner

KNOWING = discover_jobs(SAMPLE_JOBS)
NOT_KNOWING = discover_jobs()


async def heard_by_one_that_does_not_know(bench: Bench, redis_url: str, messages: int) -> None:
    """Have all that is in Redis heard by a worker of the older program."""
    bench.jobs = NOT_KNOWING
    async with hearing(redis_url) as ear:
        delivery = Delivery(await bench.register(), ear)
        for message in await ear.claim(messages):
            await delivery.carry_out(message)
    bench.jobs = KNOWING


async def adopt(bench: Bench, queues: Sequence[str] = ("default",)) -> None:
    assert not await adopt_known(bench.sessions, KNOWING, queues, within_s=60)


async def adopt_all(gleaner: Gleaner) -> None:
    while await gleaner.adopt():
        pass


async def still_parked(stage: Stage) -> list[tuple[Any, ...]]:
    rows = await stage._connection.fetch(
        "SELECT kind, queue, reason FROM bulwark.parked WHERE job_id IS NULL ORDER BY id"
    )
    return [tuple(row.values()) for row in rows]


async def test_however_many_workers_know_them_each_message_becomes_one_job_that_runs_once(
    bench: Bench,
    stage: Stage,
    client: ArqRedis,
    redis: ArqRedis,
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adopting, "BATCH", 4)
    async with hearing(redis_url, ["empty"]) as ear:
        gleaners = [Gleaner(bench.sessions, redis, ear, ("default",), KNOWING) for _ in range(3)]
        for one in gleaners:  # a worker may hear of a kind long after another one has started
            assert not await one.adopt()
        for n in range(30):
            await client.enqueue_job("act_out", {"note": str(n)})
        await heard_by_one_that_does_not_know(bench, redis_url, 30)
        assert await still_parked(stage) == [("act_out", "default", "unknown_job")] * 30
        with capture_logs() as logs:
            await asyncio.gather(*map(adopt_all, gleaners))
    assert await still_parked(stage) == []
    assert await stage.value("SELECT count(*) FROM bulwark.job") == 30
    made = "SELECT count(*) FROM bulwark.parked JOIN bulwark.job USING (arq_id, queue) "
    assert await stage.value(f"{made} WHERE parked.job_id = job.id") == 30
    assert [one["event"] for one in logs].count("message.adopted") == 30
    assert {one.state for one in await bench.run_jobs()} == {"succeeded"}
    assert sorted(await stage.notes(), key=int) == [str(n) for n in range(30)]


async def test_a_message_that_is_no_job_for_another_reason_stays_with_that_and_holds_up_no_other(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str
) -> None:
    await client.enqueue_job("act_out", "no object")
    await client.enqueue_job("act_out", {"note": "a NUL \0"})
    await client.enqueue_job("act_out", {"note": "fit"})
    await heard_by_one_that_does_not_know(bench, redis_url, 3)
    with capture_logs() as logs:
        await adopt(bench)
        await adopt(bench)
    assert sorted(reason for *_, reason in await still_parked(stage)) == [
        "bad_arguments",
        "unstorable",
    ]
    told = [one["reason"] for one in logs if one["event"] == "message.parked"]
    assert sorted(told) == ["bad_arguments", "unstorable"]
    await bench.run_jobs()
    assert await stage.notes() == ["fit"]


async def test_parked_messages_are_adopted_a_while_at_a_time_until_none_is_left(
    bench: Bench,
    stage: Stage,
    client: ArqRedis,
    redis: ArqRedis,
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adopting, "BATCH", 2)
    monkeypatch.setattr(gleaner_module, "ADOPT_FOR_S", 0.0)
    for name in ("GLEAN_INTERVAL_S", "LOOK_INTERVAL_S"):
        monkeypatch.setattr(gleaner_module, name, 3600.0)
    for n in range(20):
        await client.enqueue_job("act_out", {"note": str(n)})
    await heard_by_one_that_does_not_know(bench, redis_url, 20)
    assert await adopt_known(bench.sessions, KNOWING, ("default",), within_s=0)
    assert len(await still_parked(stage)) == 18

    async def none_is_left() -> bool:
        return await still_parked(stage) == []

    async with hearing(redis_url, ["empty"]) as ear:
        gleaner = Gleaner(bench.sessions, redis, ear, ("default",), KNOWING)
        gleaning = asyncio.create_task(gleaner.run_forever())
        await until(none_is_left, "all messages are jobs")
        gleaning.cancel()
    assert await stage.value("SELECT count(*) FROM bulwark.job") == 20


async def test_a_message_larger_than_any_payload_is_not_even_read(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str
) -> None:
    note = "\N{OLD PERSIAN SIGN A}" * (MAX_MESSAGE_BYTES // 4)
    await client.enqueue_job("act_out", {"note": note})
    await client.enqueue_job("act_out", {"note": "fit"})
    await heard_by_one_that_does_not_know(bench, redis_url, 2)
    tracemalloc.start()
    await adopt(bench)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < MAX_MESSAGE_BYTES
    assert await still_parked(stage) == [("act_out", "default", "too_large")]
    await bench.run_jobs()
    assert await stage.notes() == ["fit"]


async def test_messages_of_other_kinds_and_queues_are_left_to_workers_of_theirs(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str
) -> None:
    await client.enqueue_job("fly_to_the_moon", {})
    await client.enqueue_job("act_out", {"note": "bulky"}, _queue_name="arq:queue:bulk")
    await heard_by_one_that_does_not_know(bench, redis_url, 2)
    before = await still_parked(stage)
    assert len(before) == 2
    await adopt(bench)
    assert await still_parked(stage) == before
    await adopt(bench, ("default", "bulk"))
    assert await still_parked(stage) == [("fly_to_the_moon", "default", "unknown_job")]


async def test_a_message_that_comes_again_after_it_was_adopted_makes_no_second_job(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str
) -> None:
    """A worker that dies after it has parked a message leaves it in Redis."""
    await client.enqueue_job("act_out", {"note": "once"}, _job_id="theirs")
    content = await client.get("arq:job:theirs")
    await heard_by_one_that_does_not_know(bench, redis_url, 1)
    await adopt(bench)
    await client.set("arq:job:theirs", content)
    await client.zadd("arq:queue", {"theirs": 1})
    await heard_by_one_that_does_not_know(bench, redis_url, 1)
    await adopt(bench)
    assert await stage.value("SELECT count(*) FROM bulwark.job") == 1
    await bench.run_jobs()
    assert await stage.notes() == ["once"]
