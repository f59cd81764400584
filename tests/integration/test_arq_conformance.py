"""What arq promises to its clients holds here, too, also beside arq's own workers on the queue."""

import asyncio
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import arq.worker
import pytest
import sqlalchemy as sa
from arq.connections import ArqRedis
from arq.worker import func
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from jobs import Bell, Jobs, Producer
from jobs._bell import deserialize, queue_key, serialize
from tests.arq_side import running, working
from tests.inprocess import Bench
from tests.sample_jobs.act_out import ADD_NOTE, WAIT_AT_GATE, ActOut
from tests.stage import Stage
from tests.workers import until
from worker.arq_worker import NEEDED_OF_ARQ, ArqChanged, require_arq
from worker.redis_pool import make_redis

Sessions = async_sessionmaker[AsyncSession]


async def until_noted(stage: Stage, *notes: str) -> None:
    async def noted() -> bool:
        return Counter(await stage.notes()) >= Counter(notes)

    await until(noted, f"the notes {notes} are written")


async def until_all_have_ended(stage: Stage) -> None:
    async def ended() -> bool:
        return not await stage.value(
            "SELECT count(*) FROM bulwark.job WHERE state IN ('queued', 'running')"
        )

    await until(ended, "all jobs have ended")


async def test_what_a_plain_client_enqueues_is_carried_out_once(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str
) -> None:
    async with working(bench, redis_url):
        await client.enqueue_job("act_out", {"note": "one object"})
        await client.enqueue_job("act_out", note="by name")
        await client.enqueue_job("act_out")
        await until_noted(stage, "one object", "by name", "done")
        await until_all_have_ended(stage)
    assert len(await stage.notes()) == 3
    assert await client.keys("*") == []


async def test_an_id_that_still_waits_is_refused_and_can_be_used_again_later(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str
) -> None:
    assert await client.enqueue_job("act_out", note="first", _job_id="nightly") is not None
    assert await client.enqueue_job("act_out", note="refused", _job_id="nightly") is None
    async with working(bench, redis_url):
        await until_noted(stage, "first")
        await until_all_have_ended(stage)
        assert await client.enqueue_job("act_out", note="second", _job_id="nightly") is not None
        await until_noted(stage, "second")
    assert await stage.notes() == ["first", "second"]


@pytest.mark.parametrize("way", ["_defer_by", "_defer_until"])
async def test_what_is_deferred_is_carried_out_when_it_is_due_and_not_before(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str, way: str
) -> None:
    delay = timedelta(seconds=3)
    due = datetime.now(UTC) + delay
    deferral: Any = delay if way == "_defer_by" else due
    async with working(bench, redis_url):
        await client.enqueue_job("act_out", note="now")
        await client.enqueue_job("act_out", note="later", **{way: deferral})
        await until_noted(stage, "now", "later")
    assert await stage.notes() == ["now", "later"]
    started = await stage.value(
        "SELECT started_at FROM bulwark.job WHERE payload ->> 'note' = 'later'"
    )
    assert started >= due - timedelta(milliseconds=50)


async def test_a_job_that_takes_too_long_is_ended(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str
) -> None:
    declared = bench.jobs["act_out"]
    limits = replace(declared.defaults, timeout_s=1, max_attempts=1)
    bench.jobs = Jobs([replace(declared, defaults=limits)])
    async with working(bench, redis_url):
        await client.enqueue_job("act_out", then="hang")
        await until_all_have_ended_once_there_is_one(stage)
    assert await stage.value("SELECT state || ' ' || reason FROM bulwark.job") == "failed timed_out"
    assert await stage.notes() == []


async def until_all_have_ended_once_there_is_one(stage: Stage) -> None:
    await until(lambda: stage.value("SELECT count(*) FROM bulwark.job"), "there is a job")
    await until_all_have_ended(stage)


async def test_each_worker_serves_the_queues_it_was_told_and_no_other(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str
) -> None:
    async with working(bench, redis_url, queues=("default", "bulk")):
        for queue in ("other", "bulk", "default"):
            await client.enqueue_job("act_out", note=queue, _queue_name=queue_key(queue))
        await until_noted(stage, "bulk", "default")
        await until_all_have_ended(stage)
    assert sorted(await stage.notes()) == ["bulk", "default"]
    assert await client.zcard(queue_key("other")) == 1
    queues = await stage.value("SELECT string_agg(queue, ' ' ORDER BY queue) FROM bulwark.job")
    assert queues == "bulk default"


async def test_no_more_jobs_run_at_once_than_the_worker_may_run(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str
) -> None:
    await stage.close_gate()
    async with working(bench, redis_url, max_jobs=3):
        for _ in range(5):
            await client.enqueue_job("act_out", gate=True)
        await stage.somebody_at_gate(3)
        assert await client.zcard(queue_key("default")) == 2
        await stage.open_gate()
        await until_noted(stage, *["done"] * 5)


async def test_one_wake_up_is_enough_for_more_jobs_than_one_worker_takes(
    bench: Bench, sessions: Sessions, stage: Stage, client: ArqRedis, redis_url: str
) -> None:
    """Neither worker looks by itself while the test lasts."""
    await stage.close_gate()
    other = Bench(sessions, "", bench.jobs)
    producer = Producer(sessions, bench.jobs, Bell(client))
    async with (
        working(bench, redis_url, max_jobs=2, poll_interval_s=90),
        working(other, redis_url, max_jobs=2, poll_interval_s=90),
    ):
        await producer.enqueue_many([ActOut(gate=True) for _ in range(4)])
        async with asyncio.timeout(30):
            await stage.somebody_at_gate(4)
            await stage.open_gate()
            await until_all_have_ended(stage)


@pytest.mark.filterwarnings("ignore:Call to deprecated close:DeprecationWarning")  # by arq
async def test_beside_workers_of_arq_on_one_queue_each_job_runs_once(
    bench: Bench, sessions: Sessions, stage: Stage, client: ArqRedis, redis_url: str
) -> None:
    """The gate lets nobody take a third job before each of the two has two."""
    by_arq = []

    async def act_out(ctx: dict[Any, Any], payload: dict[str, str]) -> None:
        by_arq.append(payload["note"])
        async with sessions.begin() as session:
            await session.execute(ADD_NOTE, {"text": payload["note"]})
            await session.execute(WAIT_AT_GATE)

    stock = arq.worker.Worker(
        [func(act_out, name="act_out")],
        redis_pool=make_redis(redis_url, 5.0),
        job_serializer=serialize,
        job_deserializer=deserialize,
        poll_delay=0.02,
        max_jobs=2,
        keep_result=0,
        handle_signals=False,
    )
    await stage.close_gate()
    notes = [f"job {number}" for number in range(60)]
    async with running(stock), working(bench, redis_url, max_jobs=2):
        for note in notes:
            await client.enqueue_job("act_out", {"note": note, "gate": True})
        await stage.somebody_at_gate(4)
        await stage.open_gate()
        await until_noted(stage, *notes)
        await until_all_have_ended(stage)
    assert sorted(await stage.notes()) == sorted(notes)
    async with sessions() as session:
        by_us = await session.scalars(sa.text("SELECT payload ->> 'note' FROM bulwark.job"))
        assert sorted([*by_us, *by_arq]) == sorted(notes)
    assert 2 <= len(by_arq) <= len(notes) - 2


@pytest.mark.parametrize("name", NEEDED_OF_ARQ)
def test_an_arq_that_lacks_what_is_needed_is_refused_by_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_arq()
    monkeypatch.delattr(arq.worker.Worker, name)
    with pytest.raises(ArqChanged, match=rf"arq [0-9.]+ has no Worker\.{name}"):
        require_arq()
