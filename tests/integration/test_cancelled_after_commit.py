"""What is committed counts, also when the job is cancelled before its worker can know of it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from db.engine import PoolProfile, create_engine, make_sessions
from db.ledger.cancellation import cancel
from db.transaction import transaction
from jobs._declaration import Payload
from jobs._discovery import discover_jobs
from jobs.insert_rows import InsertRows
from tests.inprocess import Bench
from tests.proxy import Cut, Proxy, proxied
from tests.sample_jobs.act_out import ActOut
from tests.sample_jobs.write_notes import WriteNotes
from tests.stage import SAMPLE_JOBS, Stage

FENCE = b"FOR SHARE OF job"
LAST_WORDS = b"DELETE FROM bulwark.progress"
"""What an atomic job does last before it commits."""
ATOMIC = InsertRows(
    table="team", rows=[{"name": f"team {n}"} for n in range(1, 6)], chunk_rows=2, atomic=True
)


@asynccontextmanager
async def through_proxy(url: str) -> AsyncIterator[tuple[Proxy, Bench]]:
    """A bench whose connections all go through a proxy that can cut them, or hold them up."""
    async with proxied(url) as (proxy, proxied_url):
        engine = create_engine(
            proxied_url, profile=PoolProfile.LIGHT, application_name="test_cancelled_after_commit"
        )
        yield proxy, Bench(make_sessions(engine), proxied_url, discover_jobs(SAMPLE_JOBS))
        await engine.dispose()


async def cancel_before_the_next_try(
    proxy: Proxy, bench: Bench, job_id: UUID, delivery: asyncio.Task[Any]
) -> list[str]:
    """Cancel when the fence is asked again; return how the job's life is told from then on."""
    await proxy.holds.wait()
    await transaction(
        bench.sessions,
        lambda session: cancel(session, job_id, None, at_once=False),
        name="test",
        receipted=True,
    )
    proxy.release()
    with capture_logs() as logs:
        await delivery
    return [line["event"] for line in logs if line["event"].startswith("job.")]


@pytest.mark.parametrize(
    ("payload", "notes"),
    [(ActOut(gate=True), ["done"]), (WriteNotes(chunks=1, gate_in=1), ["chunk 1"])],
)
async def test_a_job_whose_last_commit_had_no_answer_succeeds_when_it_is_cancelled_then(
    stage: Stage, bench: Bench, database_url: str, payload: Payload, notes: list[str]
) -> None:
    async with through_proxy(database_url) as (proxy, far):
        job_id = (await far.producer.enqueue(payload)).job_id
        await stage.close_gate()
        delivery = asyncio.create_task(far.deliver(job_id))
        await stage.somebody_at_gate()
        proxy.hold(FENCE)
        proxy.arm(Cut.ANSWER)
        await stage.open_gate()
        told = await cancel_before_the_next_try(proxy, bench, job_id, delivery)
    assert told == ["job.succeeded"]
    assert await stage.ended_as(job_id) == ("succeeded", None, 0)
    assert await stage.notes() == notes


async def test_a_job_of_more_chunks_goes_no_further_than_what_it_has_committed(
    stage: Stage, bench: Bench, database_url: str
) -> None:
    async with through_proxy(database_url) as (proxy, far):
        job_id = (await far.producer.enqueue(WriteNotes(chunks=2, gate_in=1))).job_id
        await stage.close_gate()
        delivery = asyncio.create_task(far.deliver(job_id))
        await stage.somebody_at_gate()
        proxy.hold(FENCE)
        proxy.arm(Cut.ANSWER)
        await stage.open_gate()
        told = await cancel_before_the_next_try(proxy, bench, job_id, delivery)
    assert told == ["job.cancelled"]
    assert await stage.notes() == ["chunk 1"]
    assert await bench.counts(job_id) == {"inserted": 1}


@pytest.mark.parametrize(
    ("cut", "end", "rows", "counts"),
    [
        (Cut.ANSWER, "succeeded", 5, {"inserted": 5}),
        (Cut.CLIENT, "succeeded", 5, {"inserted": 5}),
        (Cut.QUESTION, "cancelled", 0, {"not_reached": 5}),
    ],
)
async def test_an_atomic_job_is_cancelled_only_if_it_was_not_committed(
    stage: Stage,
    bench: Bench,
    database_url: str,
    cut: Cut,
    end: str,
    rows: int,
    counts: dict[str, int],
) -> None:
    async with through_proxy(database_url) as (proxy, far):
        job_id = (await far.producer.enqueue(ATOMIC)).job_id
        proxy.hold(LAST_WORDS)
        delivery = asyncio.create_task(far.deliver(job_id))
        await proxy.holds.wait()
        proxy.release()
        proxy.hold(FENCE)
        proxy.arm(cut)
        told = await cancel_before_the_next_try(proxy, bench, job_id, delivery)
        assert proxy.cuts == [cut]
    assert told == [f"job.{end}"]
    assert await stage.ended_as(job_id) == (end, None, 0)
    assert await stage.value("SELECT count(*) FROM team") == rows
    assert await bench.counts(job_id) == counts
