"""The worker that the pytest plugin gives: it runs what is queued, and says what became of it."""

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from jobs import discover_jobs
from jobs.insert_rows import InsertRows
from tests.inprocess import Bench
from tests.sample_jobs.act_out import ActOut
from tests.sample_jobs.carry_on import CarryOn
from tests.sample_jobs.take_down import TakeDown
from tests.stage import SAMPLE_JOBS, Stage, connected, waiting_for_a_lock
from tests.workers import until
from worker.testing.databases import Database
from worker.testing.in_process import EndlessJobs, InProcessWorker

pytestmark = pytest.mark.usefixtures("stage")


@pytest.fixture
def worker(bulwark_database: Database) -> InProcessWorker:
    jobs = discover_jobs([*SAMPLE_JOBS, "tests.sample_jobs.carry_on"])
    return Bench(bulwark_database.sessions, bulwark_database.url, jobs)


async def test_nothing_queued_is_nothing_run(worker: InProcessWorker) -> None:
    assert await worker.run_jobs() == []


async def test_each_job_is_reported_at_its_end_in_the_order_of_running(
    worker: InProcessWorker, stage: Stage
) -> None:
    await worker.producer.enqueue(ActOut(note="later"), priority=-1)
    await worker.producer.enqueue(ActOut(note="refused", then="reject"), queue="elsewhere")
    refused, later = await worker.run_jobs()
    assert (refused.state, refused.error) == ("failed", "no such club")
    assert (later.state, later.kind, later.ended) == ("succeeded", "act_out", True)
    assert await stage.notes() == ["later"]


async def test_what_jobs_enqueue_is_run_as_well(worker: InProcessWorker) -> None:
    await worker.producer.enqueue(CarryOn(times=3))
    assert [one.outcome for one in await worker.run_jobs()] == [
        {"left": left} for left in (3, 2, 1, 0)
    ]


async def test_jobs_that_never_end_are_an_error_that_names_their_kind(
    worker: InProcessWorker,
) -> None:
    await worker.producer.enqueue(CarryOn(times=100))
    with pytest.raises(EndlessJobs, match="After 10 runs a carry_on is still queued"):
        await worker.run_jobs(most_runs=10)


async def test_what_is_to_run_later_waits_until_it_is_asked_for(worker: InProcessWorker) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    await worker.producer.enqueue(ActOut(), run_at=tomorrow)
    assert await worker.run_jobs() == []
    [done] = await worker.run_jobs(with_scheduled=True)
    assert done.state == "succeeded"


async def test_a_job_that_fails_is_queued_again_or_uses_up_its_attempts(
    worker: InProcessWorker, stage: Stage
) -> None:
    await worker.producer.enqueue(ActOut(then="fail"))
    [once] = await worker.run_jobs()
    assert (once.state, once.attempt) == ("queued", 1)
    assert once.error is not None
    assert "the dice fell badly" in once.error
    [ended] = await worker.run_jobs(with_scheduled=True)
    assert (ended.id, ended.state, ended.reason) == (once.id, "failed", "attempts_exhausted")
    assert await stage.notes() == []


AT_ONCE = """
    CREATE FUNCTION at_once() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN NEW.run_at = now(); RETURN NEW; END';
    CREATE TRIGGER at_once BEFORE UPDATE ON bulwark.job FOR EACH ROW EXECUTE FUNCTION at_once();
"""
"""The shortest of the waits before another try, which are drawn."""


async def test_a_job_that_fails_is_not_tried_again_however_soon_that_is_due(
    worker: InProcessWorker, stage: Stage
) -> None:
    await stage.execute(AT_ONCE)
    await worker.producer.enqueue(ActOut(then="fail"))
    [once] = await worker.run_jobs()
    assert (once.state, once.attempt) == ("queued", 1)


async def test_jobs_with_a_batch_form_are_done_in_one_transaction(
    worker: InProcessWorker, stage: Stage
) -> None:
    await worker.producer.enqueue_many([TakeDown(note=note) for note in "abc"])
    assert [one.state for one in await worker.run_jobs()] == ["succeeded"] * 3
    assert await stage.value("SELECT count(DISTINCT xmin::text) FROM note") == 1
    assert sorted(await stage.notes()) == ["a", "b", "c"]


def test_the_worker_of_a_test_works_in_one_event_loop_after_another(
    bulwark_worker: InProcessWorker,
) -> None:
    async def insert(name: str) -> list[str]:
        await bulwark_worker.producer.enqueue(InsertRows(table="team", rows=[{"name": name}]))
        return [one.state for one in await bulwark_worker.run_jobs()]

    assert [asyncio.run(insert(name)) for name in ("Red", "Blue")] == [["succeeded"]] * 2


async def test_a_delivery_that_registers_while_another_ends_is_carried_out(
    worker: InProcessWorker, stage: Stage, database_url: str
) -> None:
    ids = [(await worker.producer.enqueue(ActOut(note=note))).job_id for note in "ab"]
    async with connected(database_url) as other, other.transaction():
        await other.execute("LOCK TABLE bulwark.worker IN SHARE ROW EXCLUSIVE MODE")
        slow = asyncio.create_task(worker.deliver(ids[0]))
        await until(lambda: waiting_for_a_lock(worker.sessions), "the delivery registers")
        worker.worker_id = uuid4()  # as the end of another delivery does
    await slow
    await worker.deliver(ids[1])
    assert await stage.notes() == ["a", "b"]
