"""Jobs that wait together are done in one transaction, and each ends as it would have by itself."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from structlog.testing import capture_logs

from db.engine import PoolProfile, create_engine, make_sessions
from db.ledger import worker
from db.ledger.job import claim
from db.ledger.take_back import from_worker
from db.transaction import transaction
from jobs._discovery import discover_jobs
from jobs._producer import new_job_id
from tests.inprocess import Bench
from tests.proxy import BREAKS, Cut, proxied
from tests.sample_jobs.act_out import BAD_ROWS
from tests.sample_jobs.take_down import TakeDown
from tests.stage import SAMPLE_JOBS, Stage
from tests.workers import until
from worker.executor import Executor
from worker.gathering import FEW_TOGETHER, MOST_BATCHES, MOST_TOGETHER

KIND = "take_down"


async def accept(bench: Bench, *payloads: TakeDown, **terms: Any) -> list[UUID]:
    accepted = await bench.producer.enqueue_many(payloads, **terms)
    return [one.job_id for one in accepted]


def notes(number: int) -> list[TakeDown]:
    return [TakeDown(note=f"{at}") for at in range(number)]


async def deliver(executor: Executor, *job_ids: UUID) -> None:
    await asyncio.gather(*(executor.deliver(job_id, KIND) for job_id in job_ids))


async def ends(stage: Stage, job_ids: Sequence[UUID]) -> Counter[tuple[str, str | None, int]]:
    return Counter([await stage.ended_as(job_id) for job_id in job_ids])


async def sizes(stage: Stage, job_ids: Sequence[UUID]) -> Counter[int]:
    """How many jobs went together with how many."""
    outcomes = [(await stage.row(job_id))["outcome"] for job_id in job_ids]
    return Counter(json.loads(one)["together"] for one in outcomes if one is not None)


def told(logs: Sequence[Any], event: str) -> set[str]:
    """The claims of which this was said."""
    return {line["claim"] for line in logs if line["event"] == event}


SUCCEEDED = ("succeeded", None, 0)


# What goes together


async def test_two_rings_bring_all_the_jobs_that_wait_behind_them(
    stage: Stage, bench: Bench
) -> None:
    job_ids = await accept(bench, *notes(50))
    with capture_logs() as logs:
        await deliver(await bench.register(), *job_ids[:2])
    assert await ends(stage, job_ids) == {SUCCEEDED: 50}
    assert await sizes(stage, job_ids) == {50: 50}
    assert await stage.notes() == [f"{at}" for at in range(50)]
    assert len(told(logs, "job.started")) == len(told(logs, "job.succeeded")) == 50


async def test_one_ring_brings_a_few_and_the_next_many_if_there_are_as_many(
    stage: Stage, bench: Bench
) -> None:
    executor = await bench.register()
    job_ids = await accept(bench, *notes(FEW_TOGETHER + 20))
    await deliver(executor, job_ids[0])
    await deliver(executor, job_ids[FEW_TOGETHER])
    assert await sizes(stage, job_ids) == {FEW_TOGETHER: FEW_TOGETHER, 20: 20}


async def test_a_job_that_waits_by_itself_is_run_by_itself(stage: Stage, bench: Bench) -> None:
    job_ids = await accept(bench, *notes(1))
    await deliver(await bench.register(), *job_ids)
    assert await sizes(stage, job_ids) == {1: 1}


async def test_jobs_that_are_heard_in_one_breath_go_together_whatever_their_queues(
    stage: Stage, bench: Bench
) -> None:
    job_ids = [
        (await accept(bench, TakeDown(note=queue), queue=queue))[0] for queue in ("a", "b", "c")
    ]
    await deliver(await bench.register(), *job_ids)
    assert await ends(stage, job_ids) == {SUCCEEDED: 3}
    assert await sizes(stage, job_ids) == {3: 3}


async def test_no_batch_is_larger_than_it_may_be(stage: Stage, bench: Bench) -> None:
    job_ids = await accept(bench, *notes(MOST_TOGETHER + 5))
    await deliver(await bench.register(), *job_ids[:2])
    assert await ends(stage, job_ids) == {SUCCEEDED: MOST_TOGETHER, ("queued", None, 0): 5}
    assert {job_ids[at] for at in range(MOST_TOGETHER)} == {
        job_id for job_id in job_ids if (await stage.row(job_id))["state"] == "succeeded"
    }


async def test_only_jobs_of_its_kind_queue_and_priority_that_are_due_come_along(
    stage: Stage, bench: Bench
) -> None:
    [first] = await accept(bench, TakeDown(note="first"))
    others = [
        *await accept(bench, TakeDown(note="elsewhere"), queue="elsewhere"),
        *await accept(bench, TakeDown(note="urgent"), priority=1),
        *await accept(bench, TakeDown(note="later")),
        *await accept(bench, TakeDown(note="other kind")),
        *await accept(bench, TakeDown(note="was in a crash")),
        *await accept(bench, TakeDown(note="has failed")),
    ]
    await stage.value(
        "UPDATE bulwark.job SET run_at = now() + interval '1 h' WHERE id = $1", others[2]
    )
    await stage.value("UPDATE bulwark.job SET kind = 'act_out' WHERE id = $1", others[3])
    await stage.value("UPDATE bulwark.job SET crashes = 1 WHERE id = $1", others[4])
    await stage.value("UPDATE bulwark.job SET attempt = 1 WHERE id = $1", others[5])
    [last] = await accept(bench, TakeDown(note="last"))
    await deliver(await bench.register(), first)
    assert {(await stage.row(job_id))["state"] for job_id in others} == {"queued"}
    assert await sizes(stage, [first, last]) == {2: 2}


async def test_rings_of_jobs_that_came_along_are_silenced_once_they_are_claimed(
    stage: Stage, bench: Bench
) -> None:
    executor = await bench.register()
    silenced: list[tuple[UUID, int]] = []

    async def note_rings(rings: Any) -> None:
        silenced.extend((one.job_id, one.number) for one in rings)

    executor.silence = note_rings
    job_ids = await accept(bench, *notes(5))
    await deliver(executor, *job_ids[:2])
    assert sorted(silenced) == [(job_id, 0) for job_id in job_ids[2:]]


async def test_at_most_two_batches_of_a_kind_run_while_the_next_gathers(
    stage: Stage, bench: Bench
) -> None:
    executor = await bench.register()
    await stage.close_gate()
    early = [
        (await accept(bench, TakeDown(note=queue, gate=True), queue=queue))[0] for queue in "ab"
    ]
    working = [asyncio.create_task(executor.deliver(job_id, KIND)) for job_id in early]
    await stage.somebody_at_gate(1)
    late = [(await accept(bench, TakeDown(note=queue), queue=queue))[0] for queue in "cdef"]
    more = await accept(bench, TakeDown(note="g", gate=True), queue="g")
    working += [asyncio.create_task(executor.deliver(job_id, KIND)) for job_id in more]
    await stage.somebody_at_gate(MOST_BATCHES)
    waiting = [asyncio.create_task(executor.deliver(job_id, KIND)) for job_id in late]
    await until(lambda: _true(len(executor._gatherings[KIND]._waiting) == 4), "all wait")
    assert await ends(stage, late) == {("queued", None, 0): 4}
    await stage.open_gate()
    await asyncio.gather(*working, *waiting)
    assert await sizes(stage, late) == {4: 4}


async def test_a_worker_that_is_about_to_end_takes_no_company(stage: Stage, bench: Bench) -> None:
    executor = await bench.register()
    executor.liveness.retire()
    job_ids = await accept(bench, *notes(5))
    await deliver(executor, *job_ids[:2])
    assert await sizes(stage, job_ids[:2]) == {2: 2}
    assert await ends(stage, job_ids[2:]) == {("queued", None, 0): 3}


# One that fails does not take others with it


async def test_a_refusal_fails_its_job_alone_with_its_verdicts(stage: Stage, bench: Bench) -> None:
    job_ids = await accept(
        bench, TakeDown(note="a"), TakeDown(note="b", then="reject"), TakeDown(note="c")
    )
    with capture_logs() as logs:
        await deliver(await bench.register(), job_ids[0])
    assert [await stage.ended_as(job_id) for job_id in job_ids] == [
        SUCCEEDED,
        ("failed", "rejected", 1),
        SUCCEEDED,
    ]
    refused = await stage.row(job_ids[1])
    assert refused["error"] == "no such club"
    assert json.loads(refused["outcome"]) == {"verdicts": {"rejected": 2, "not_reached": 1}}
    assert len(await bench.verdicts(job_ids[1])) == len(BAD_ROWS)
    assert await stage.notes() == ["a", "c"]
    assert await sizes(stage, [job_ids[0], job_ids[2]]) == {3: 2}
    assert len(told(logs, "job.failed")) == 1


async def test_a_payload_that_cannot_be_read_fails_its_job_alone(
    stage: Stage, bench: Bench
) -> None:
    job_ids = await accept(bench, *notes(3))
    await stage.value(
        """UPDATE bulwark.job SET payload = '{"nota": "Kal-El"}' WHERE id = $1""", job_ids[1]
    )
    await deliver(await bench.register(), job_ids[0])
    assert await stage.ended_as(job_ids[1]) == ("failed", "rejected", 1)
    assert await sizes(stage, [job_ids[0], job_ids[2]]) == {2: 2}


@pytest.mark.parametrize("deed", ["fail", "break_a_constraint", "return_an_object"])
async def test_one_bad_job_among_fifty_costs_no_other_an_attempt(
    stage: Stage, bench: Bench, deed: Any
) -> None:
    payloads = notes(50)
    payloads[20] = TakeDown(note="bad", then=deed)
    job_ids = await accept(bench, *payloads)
    with capture_logs() as logs:
        await deliver(await bench.register(), *job_ids[:2])
    bad = job_ids.pop(20)
    assert await stage.ended_as(bad) == ("queued", "retry", 1)
    assert await ends(stage, job_ids) == {SUCCEEDED: 49}
    assert await stage.notes() == [f"{at}" for at in range(50) if at != 20]
    assert [line["jobs"] for line in logs if line["event"] == "batch.failed"] == [50]


async def test_a_job_that_has_failed_is_tried_again_by_itself(stage: Stage, bench: Bench) -> None:
    executor = await bench.register()
    [bad] = await accept(bench, TakeDown(note="bad", then="fail"))
    await deliver(executor, bad)
    job_ids = await accept(bench, *notes(3))
    await stage.make_due(bad)
    with capture_logs() as logs:
        await deliver(executor, bad, *job_ids)
    assert "batch.failed" not in {line["event"] for line in logs}
    assert await stage.ended_as(bad) == ("queued", "retry", 2)
    assert await sizes(stage, job_ids) == {3: 3}


async def test_results_that_are_too_few_are_not_believed(stage: Stage, bench: Bench) -> None:
    job_ids = await accept(bench, *notes(2), TakeDown(note="2", then="return_too_few"))
    with capture_logs() as logs:
        await deliver(await bench.register(), job_ids[0])
    assert await sizes(stage, job_ids) == {1: 3}
    assert await stage.notes() == ["0", "1", "2"]
    [failed] = [line for line in logs if line["event"] == "batch.failed"]
    assert "returned 2 results for 3 orders" in failed["reason"]


async def test_a_batch_that_hangs_is_stopped_after_the_longest_limit_in_it(
    stage: Stage, bench: Bench
) -> None:
    [first] = await accept(bench, TakeDown(note="a"), timeout_s=1)
    [second] = await accept(bench, TakeDown(note="b", then="hang_together"), timeout_s=2)
    with capture_logs() as logs:
        await asyncio.wait_for(deliver(await bench.register(), first), 30)
    assert "batch.failed" in {line["event"] for line in logs}
    assert await sizes(stage, [first, second]) == {1: 2}
    assert await stage.notes() == ["a", "b"]


async def test_a_job_that_was_present_at_a_crash_runs_by_itself(stage: Stage, bench: Bench) -> None:
    job_ids = await accept(bench, *notes(4))
    for crashes, job_id in ((2, job_ids[0]), (1, job_ids[2])):
        await stage.value("UPDATE bulwark.job SET crashes = $1 WHERE id = $2", crashes, job_id)
    await deliver(await bench.register(), *job_ids)
    assert await ends(stage, job_ids) == {SUCCEEDED: 4}
    assert await sizes(stage, [job_ids[0], job_ids[2]]) == {1: 2}


# Exactly once


async def test_deliveries_that_come_twice_or_late_do_nothing(stage: Stage, bench: Bench) -> None:
    executor = await bench.register()
    job_ids = await accept(bench, *notes(10))
    await deliver(executor, *job_ids, *job_ids)
    await deliver(executor, *job_ids, new_job_id())
    assert await ends(stage, job_ids) == {SUCCEEDED: 10}
    assert sorted(await stage.notes()) == [f"{at}" for at in range(10)]


async def test_two_workers_that_hear_the_same_jobs_share_them(stage: Stage, bench: Bench) -> None:
    one = await bench.register()
    bench.worker_id = uuid4()
    other = await bench.register()
    job_ids = await accept(bench, *notes(150))
    await asyncio.gather(
        deliver(one, *job_ids[:5]), deliver(other, *job_ids[:5]), deliver(one, *job_ids[100:])
    )
    for executor in (one, other):
        await deliver(executor, *job_ids)
    assert await ends(stage, job_ids) == {SUCCEEDED: 150}
    assert len(await stage.notes()) == len(set(await stage.notes())) == 150


async def take_back(bench: Bench, worker_id: UUID) -> None:
    async def lose(session: AsyncSession) -> None:
        await worker.deregister(session, worker_id)
        await from_worker(session, worker_id)

    await transaction(bench.sessions, lose, name="test", receipted=True)


async def test_a_job_that_was_taken_back_meanwhile_is_left_out_and_the_others_go_on(
    stage: Stage, bench: Bench, database_url: str
) -> None:
    async with through_proxy(database_url) as (proxy, far):
        executor, job_ids = await far.register(), await accept(far, *notes(3))
        proxy.hold(b"FOR SHARE OF job")
        with capture_logs() as logs:
            delivery = asyncio.create_task(deliver(executor, job_ids[0]))
            await proxy.holds.wait()
            await stage.value(
                "UPDATE bulwark.job SET state = 'queued', claim_id = NULL WHERE id = $1", job_ids[1]
            )
            proxy.release()
            await delivery
        assert len(told(logs, "job.claim_lost")) == 1
    assert [await stage.ended_as(job_id) for job_id in job_ids] == [
        SUCCEEDED,
        ("queued", None, 0),
        SUCCEEDED,
    ]
    assert await sizes(stage, [job_ids[0], job_ids[2]]) == {2: 2}
    assert await stage.notes() == ["0", "2"]


async def test_a_batch_whose_claims_were_all_taken_back_changes_nothing(
    stage: Stage, bench: Bench, database_url: str
) -> None:
    async with through_proxy(database_url) as (proxy, far):
        executor, job_ids = await far.register(), await accept(far, *notes(3))
        proxy.hold(b"FOR SHARE OF job")
        delivery = asyncio.create_task(deliver(executor, job_ids[0]))
        await proxy.holds.wait()
        await take_back(bench, executor.worker_id)
        proxy.release()
        await delivery
    assert await ends(stage, job_ids) == {("queued", "rescued", 0): 3}
    assert await stage.notes() == []


async def test_a_claim_of_many_whose_answer_was_lost_is_found_again(
    stage: Stage, database_url: str
) -> None:
    async with through_proxy(database_url) as (proxy, far):
        executor, job_ids = await far.register(), await accept(far, *notes(20))
        proxy.arm(Cut.ANSWER)
        await deliver(executor, *job_ids[:2])
        assert proxy.cuts == [Cut.ANSWER]
    assert await ends(stage, job_ids) == {SUCCEEDED: 20}
    assert await sizes(stage, job_ids) == {20: 20}


@pytest.mark.parametrize("cut", BREAKS)
async def test_a_commit_of_many_without_an_answer_is_settled_exactly_once(
    stage: Stage, database_url: str, cut: Cut
) -> None:
    async with through_proxy(database_url) as (proxy, far):
        executor = await far.register()
        job_ids = await accept(
            far,
            TakeDown(note="a", gate=True),
            TakeDown(note="b", then="reject"),
            TakeDown(note="c"),
        )
        await stage.close_gate()
        delivery = asyncio.create_task(deliver(executor, job_ids[0]))
        await stage.somebody_at_gate()
        proxy.arm(cut)
        with capture_logs() as logs:
            await stage.open_gate()
            await delivery
        assert proxy.cuts == [cut]
        assert len(told(logs, "job.succeeded")) == 2
        assert len(told(logs, "job.failed")) == 1
        assert len(await far.verdicts(job_ids[1])) == len(BAD_ROWS)
    assert [(await stage.ended_as(job_id))[0] for job_id in job_ids] == [
        "succeeded",
        "failed",
        "succeeded",
    ]
    assert await stage.notes() == ["a", "c"]


async def test_a_batch_whose_backend_is_terminated_is_done_again(
    stage: Stage, bench: Bench
) -> None:
    executor = await bench.register()
    job_ids = await accept(bench, TakeDown(note="a"), TakeDown(note="b", gate=True))
    await stage.close_gate()
    delivery = asyncio.create_task(deliver(executor, job_ids[0]))
    await stage.somebody_at_gate()
    await stage.value(
        "SELECT pg_terminate_backend(pid) FROM pg_locks"
        " WHERE relation = 'bulwark.job'::regclass AND mode = 'RowShareLock'"
    )
    await stage.open_gate()
    await delivery
    assert await ends(stage, job_ids) == {SUCCEEDED: 2}
    assert await stage.notes() == ["a", "b"]


async def test_a_job_taken_back_while_others_of_its_batch_run_is_under_no_limit_any_more(
    stage: Stage, bench: Bench
) -> None:
    """Its claim is held until all are done: a limit that went on would end the process."""
    executor = await bench.register()
    [job_id] = await accept(bench, TakeDown(note="a"))
    held = await transaction(
        bench.sessions,
        lambda session: claim(session, job_id, uuid4(), executor.worker_id),
        name="test",
        receipted=True,
    )
    assert held is not None
    executor.liveness.hold(held.claim_id)
    await stage.value("UPDATE bulwark.job SET claim_id = $1 WHERE id = $2", uuid4(), held.job_id)
    await executor._execution.run(held)
    assert executor.liveness._deadlines[held.claim_id] == float("inf")


# Stopping


async def test_a_cancelled_batch_gives_all_its_jobs_back_unspent(
    stage: Stage, bench: Bench
) -> None:
    executor = await bench.register()
    job_ids = await accept(bench, TakeDown(note="a"), TakeDown(note="b", gate=True), *notes(20))
    await stage.close_gate()
    deliveries = [asyncio.create_task(executor.deliver(one, KIND)) for one in job_ids[:2]]
    await stage.somebody_at_gate()
    with capture_logs() as logs:
        executor.stop()
        await asyncio.wait(deliveries)
        await executor.settle()
    assert deliveries[0].cancelled()
    assert len(told(logs, "job.given_back")) == 22
    assert await ends(stage, job_ids) == {("queued", "given_back", 0): 22}
    assert not executor.liveness._deadlines
    await stage.open_gate()
    bench.worker_id = uuid4()
    await deliver(await bench.register(), *job_ids[:2])
    assert await ends(stage, job_ids) == {SUCCEEDED: 22}


async def test_jobs_that_wait_for_their_turn_after_a_failed_batch_are_given_back_too(
    stage: Stage, bench: Bench
) -> None:
    executor = await bench.register()
    job_ids = await accept(
        bench,
        TakeDown(note="a"),
        TakeDown(note="b", then="fail"),
        TakeDown(note="c", gate=True),
        TakeDown(note="d"),
    )
    await stage.close_gate()
    delivery = asyncio.create_task(executor.deliver(job_ids[0], KIND))
    await stage.somebody_at_gate()
    delivery.cancel()
    await asyncio.wait([delivery])
    await executor.settle()
    await stage.open_gate()
    assert [await stage.ended_as(job_id) for job_id in job_ids] == [
        SUCCEEDED,
        ("queued", "retry", 1),
        ("queued", "given_back", 0),
        ("queued", "given_back", 0),
    ]
    assert await stage.notes() == ["a"]


async def test_deliveries_that_wait_for_a_cancelled_one_go_on(stage: Stage, bench: Bench) -> None:
    executor = await bench.register()
    await stage.close_gate()
    leaders = []
    for queue in "ab":
        [job_id] = await accept(bench, TakeDown(note=queue, gate=True), queue=queue)
        leaders.append(asyncio.create_task(executor.deliver(job_id, KIND)))
        await stage.somebody_at_gate(len(leaders))
    job_ids = await accept(bench, TakeDown(note="c"), TakeDown(note="d"), queue="c")
    waiting = asyncio.create_task(deliver(executor, *job_ids))
    await until(lambda: _true(len(executor._gatherings[KIND]._waiting) == 2), "both wait")
    leaders[0].cancel()
    await waiting
    assert await sizes(stage, job_ids) == {2: 2}
    await stage.open_gate()
    await asyncio.wait(leaders)
    await executor.settle()
    assert sorted(await stage.notes()) == ["b", "c", "d"]


async def _true(value: bool) -> bool:
    return value


@asynccontextmanager
async def through_proxy(url: str) -> AsyncIterator[tuple[Any, Bench]]:
    """A bench whose connections all go through a proxy that can cut them, or hold them up."""
    async with proxied(url) as (proxy, proxied_url):
        engine = create_engine(
            proxied_url, profile=PoolProfile.LIGHT, application_name="test_batches"
        )
        yield proxy, Bench(make_sessions(engine), proxied_url, discover_jobs(SAMPLE_JOBS))
        await engine.dispose()
