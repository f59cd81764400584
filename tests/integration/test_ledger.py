"""The ledger: claims and fences, states, receipts, and the partitions that hold the records."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.errors import AlreadyCommitted, ClaimLost
from db.ledger import audit, chunk, job, progress, release, take_back, verdict, worker
from db.ledger.acceptance import insert_jobs
from db.ledger.audit import Entry, Keys
from db.ledger.chunk import Receipt, Span
from db.ledger.job import Claim, Reason, State
from db.ledger.limits import Limits
from db.ledger.verdict import RowVerdict
from db.retry import sqlstate
from db.transaction import transaction
from jobs._producer import new_job_id
from tests.stage import waiting_for_a_lock
from tests.workers import until

Sessions = async_sessionmaker[AsyncSession]
T = TypeVar("T")
SPAN = Span(first_row=1, rows=2, start_byte=0, end_byte=20, first_line=2, next_line=4)


class Ledger:
    """The ledger of one database, each step in a transaction of its own."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions

    async def do(self, work: Callable[[AsyncSession], Awaitable[T]]) -> T:
        return await transaction(self.sessions, work, name="test", receipted=True)

    async def rows(self, statement: str, **parameters: object) -> list[Any]:
        return list(await self.do(lambda s: s.execute(sa.text(statement), parameters)))

    async def run(self, statement: str, **parameters: object) -> None:
        await self.do(lambda s: s.execute(sa.text(statement), parameters))

    async def add_job(self, run_at: datetime | None = None, job_id: UUID | None = None) -> UUID:
        row = {
            "id": job_id or new_job_id(),
            "kind": "act_out",
            "payload": "{}",
            "queue": "default",
            "priority": 0,
            "max_attempts": 3,
            "timeout_s": 60,
            "actor": "ann",
            "correlation_id": None,
        }
        await self.do(lambda s: insert_jobs(s, [row], run_at, rung=False))
        return UUID(str(row["id"]))

    async def add_worker(self) -> UUID:
        worker_id = uuid4()
        await self.do(lambda s: worker.register(s, worker_id, "here", 1, ["default"]))
        return worker_id

    async def claim(
        self,
        job_id: UUID,
        worker_id: UUID,
        claim_id: UUID | None = None,
        *,
        alone: bool = False,
    ) -> Claim | None:
        claim_id = claim_id or uuid4()
        return await self.do(lambda s: job.claim(s, job_id, claim_id, worker_id, alone=alone))

    async def held(self) -> Claim:
        """A new job, claimed by a new worker."""
        held = await self.claim(await self.add_job(), await self.add_worker())
        assert held is not None
        return held

    async def state(self, job_id: UUID) -> tuple[str, str | None]:
        [row] = await self.rows("SELECT state, reason FROM bulwark.job WHERE id = :id", id=job_id)
        return row.state, row.reason

    async def lose(self, worker_id: UUID) -> list[take_back.TakenBack]:
        """Declare a worker lost and take back what it held."""
        await self.run(
            "UPDATE bulwark.worker SET ended_at = now(), end_reason = 'lost' WHERE id = :id",
            id=worker_id,
        )
        return await self.do(lambda s: take_back.from_worker(s, worker_id))

    async def someone_waits_for_a_lock(self) -> None:
        await until(lambda: waiting_for_a_lock(self.sessions), "a statement waits for a lock")


@pytest.fixture
def ledger(sessions: Sessions) -> Ledger:
    return Ledger(sessions)


async def test_a_queued_and_due_job_is_claimed_for_a_live_worker(ledger: Ledger) -> None:
    job_id, worker_id, claim_id = await ledger.add_job(), await ledger.add_worker(), uuid4()
    held = await ledger.claim(job_id, worker_id, claim_id)
    assert held is not None
    assert (held.job_id, held.claim_id, held.worker_id) == (job_id, claim_id, worker_id)
    assert (held.kind, held.attempt, held.actor) == ("act_out", 0, "ann")
    assert await ledger.state(job_id) == ("running", None)


async def test_a_job_is_not_claimed_before_its_time(ledger: Ledger) -> None:
    job_id = await ledger.add_job(run_at=datetime.now(UTC) + timedelta(hours=1))
    assert await ledger.claim(job_id, await ledger.add_worker()) is None
    assert await ledger.state(job_id) == ("queued", None)


async def test_a_worker_without_a_row_claims_nothing(ledger: Ledger) -> None:
    assert await ledger.claim(await ledger.add_job(), uuid4()) is None


async def test_a_worker_that_has_ended_claims_nothing(ledger: Ledger) -> None:
    stopped, lost = await ledger.add_worker(), await ledger.add_worker()
    await ledger.do(lambda s: worker.deregister(s, stopped))
    await ledger.lose(lost)
    job_id = await ledger.add_job()
    assert await ledger.claim(job_id, stopped) is None
    assert await ledger.claim(job_id, lost) is None


async def test_a_job_that_has_ended_is_not_claimed(ledger: Ledger) -> None:
    held = await ledger.held()
    await ledger.do(lambda s: release.end(s, held, State.SUCCEEDED))
    assert await ledger.claim(held.job_id, held.worker_id) is None


async def test_a_claim_made_again_after_a_lost_answer_is_the_same_claim(ledger: Ledger) -> None:
    held = await ledger.held()
    again = await ledger.claim(held.job_id, held.worker_id, held.claim_id)
    assert again == held


async def test_of_two_claims_at_once_one_wins(ledger: Ledger) -> None:
    job_id, worker_id = await ledger.add_job(), await ledger.add_worker()
    claims = [ledger.claim(job_id, worker_id) for _ in range(5)]
    won = [held for held in await asyncio.gather(*claims) if held is not None]
    assert len(won) == 1
    [row] = await ledger.rows("SELECT claim_id FROM bulwark.job WHERE id = :id", id=job_id)
    assert row.claim_id == won[0].claim_id


async def test_a_worker_that_is_being_declared_lost_claims_nothing(ledger: Ledger) -> None:
    job_id, worker_id = await ledger.add_job(), await ledger.add_worker()
    async with ledger.sessions() as losing:
        assert await worker.mark_lost(losing, worker_id, timedelta(seconds=-1))
        claiming = asyncio.create_task(ledger.claim(job_id, worker_id))
        await ledger.someone_waits_for_a_lock()
        await losing.commit()
    assert await claiming is None


async def test_the_fence_lets_the_current_claim_pass(ledger: Ledger) -> None:
    held = await ledger.held()
    await ledger.do(lambda s: job.fence(s, held))


async def test_the_fence_refuses_a_claim_that_was_taken_back(ledger: Ledger) -> None:
    held = await ledger.held()
    await ledger.lose(held.worker_id)
    with pytest.raises(ClaimLost):
        await ledger.do(lambda s: job.fence(s, held))
    again = await ledger.claim(held.job_id, await ledger.add_worker())
    assert again is not None
    with pytest.raises(ClaimLost):
        await ledger.do(lambda s: job.fence(s, held))


@pytest.mark.parametrize("state", [State.SUCCEEDED, State.FAILED, State.CANCELLED])
async def test_the_fence_refuses_a_claim_whose_job_has_ended(ledger: Ledger, state: State) -> None:
    held = await ledger.held()
    await ledger.do(lambda s: release.end(s, held, state))
    with pytest.raises(ClaimLost):
        await ledger.do(lambda s: job.fence(s, held))


async def test_a_rescue_waits_until_a_fenced_transaction_is_over(ledger: Ledger) -> None:
    held = await ledger.held()
    async with ledger.sessions() as fenced:
        await job.fence(fenced, held)
        rescue = asyncio.create_task(ledger.lose(held.worker_id))
        await ledger.someone_waits_for_a_lock()
        assert not rescue.done()
        await fenced.execute(sa.text("CREATE TABLE effect ()"))
        await fenced.commit()
    [taken] = await rescue
    assert taken.claim_id == held.claim_id
    assert await ledger.rows("SELECT 1 WHERE to_regclass('effect') IS NOT NULL")


async def test_a_fence_that_waits_for_a_rescue_is_refused(ledger: Ledger) -> None:
    held = await ledger.held()
    async with ledger.sessions() as rescue:
        await take_back.from_worker(rescue, held.worker_id)
        fencing = asyncio.create_task(ledger.do(lambda s: job.fence(s, held)))
        await ledger.someone_waits_for_a_lock()
        await rescue.commit()
    with pytest.raises(ClaimLost):
        await fencing


async def test_two_transactions_of_one_claim_pass_the_fence_together(ledger: Ledger) -> None:
    held = await ledger.held()
    async with ledger.sessions() as one, ledger.sessions() as other:
        await job.fence(one, held)
        await job.fence(other, held)


async def test_the_fence_sets_its_time_limits_for_this_transaction_only(ledger: Ledger) -> None:
    held = await ledger.held()
    names = ("statement_timeout", "idle_in_transaction_session_timeout", "lock_timeout")

    async def limits(session: AsyncSession) -> list[str]:
        return [str(await session.scalar(sa.text(f"SHOW {name}"))) for name in names]

    async with ledger.sessions() as session:
        before = await limits(session)
        await job.fence(session, held, Limits(statement_s=7, idle_s=5, lock_s=0.25))
        assert await limits(session) == ["7s", "5s", "250ms"]
        await session.commit()
        assert await limits(session) == before


async def test_a_fence_gives_up_on_a_lock_within_its_limit(ledger: Ledger) -> None:
    held = await ledger.held()
    async with ledger.sessions() as rescue, ledger.sessions() as fenced:
        await take_back.from_worker(rescue, held.worker_id)
        with pytest.raises(DBAPIError) as refused:
            await job.fence(fenced, held, Limits(statement_s=9, idle_s=9, lock_s=0.05))
    assert sqlstate(refused.value) == "55P03"


LEGAL = {
    ("queued", "running"),
    ("queued", "cancelled"),
    ("running", "queued"),
    ("running", "succeeded"),
    ("running", "failed"),
    ("running", "cancelled"),
    ("failed", "queued"),
    ("cancelled", "queued"),
}
STATES = ("queued", "running", "succeeded", "failed", "cancelled")
ROADS = {
    "queued": (),
    "running": ("running",),
    "succeeded": ("running", "succeeded"),
    "failed": ("running", "failed"),
    "cancelled": ("cancelled",),
}
GO = """
    UPDATE bulwark.job SET state = :state, claim_id = gen_random_uuid(),
           worker_id = gen_random_uuid() WHERE id = :id
"""


@pytest.mark.parametrize("old", STATES)
async def test_a_job_changes_only_as_the_drawing_of_states_allows(ledger: Ledger, old: str) -> None:
    for new in STATES:
        job_id = await ledger.add_job()
        for step in ROADS[old]:
            await ledger.run(GO, state=step, id=job_id)
        if old == new or (old, new) in LEGAL:
            await ledger.run(GO, state=new, id=job_id)
        else:
            with pytest.raises(IntegrityError, match=f"cannot go from {old} to {new}"):
                await ledger.run(GO, state=new, id=job_id)


async def test_a_job_that_goes_back_to_its_queue_is_due_after_the_delay(ledger: Ledger) -> None:
    held = await ledger.held()
    await ledger.do(
        lambda s: release.requeue(
            s, held, Reason.RETRY, delay=timedelta(minutes=5), error="a", costs_attempt=True
        )
    )
    [row] = await ledger.rows(
        "SELECT state, reason, error, attempt, next_ring_at = run_at AS rings_then,"
        " extract(epoch FROM run_at - now())::float AS wait_s FROM bulwark.job WHERE id = :id",
        id=held.job_id,
    )
    assert row[:5] == ("queued", "retry", "a", 1, True)
    assert row.wait_s == pytest.approx(300, abs=20)


@pytest.mark.parametrize("state", [State.SUCCEEDED, State.FAILED, State.CANCELLED, State.QUEUED])
async def test_how_far_a_job_was_is_forgotten_when_it_runs_no_more(
    ledger: Ledger, state: State
) -> None:
    held, other = await ledger.held(), await ledger.held()
    await ledger.do(lambda s: progress.tell(s, held, 7, 70))
    await ledger.do(lambda s: progress.tell(s, other, 7, 70))
    if state == State.QUEUED:
        await ledger.do(lambda s: release.requeue(s, held, Reason.RETRY))
    else:
        await ledger.do(lambda s: release.end(s, held, state))
    assert await ledger.rows("SELECT job_id FROM bulwark.progress") == [(other.job_id,)]
    await ledger.lose(other.worker_id)
    assert await ledger.rows("SELECT job_id FROM bulwark.progress") == []


async def test_only_the_owner_of_the_claim_can_end_the_job(ledger: Ledger) -> None:
    held = await ledger.held()
    await ledger.lose(held.worker_id)
    with pytest.raises(ClaimLost):
        await ledger.do(lambda s: release.end(s, held, State.SUCCEEDED))
    with pytest.raises(ClaimLost):
        await ledger.do(lambda s: release.requeue(s, held, Reason.RETRY))
    assert await ledger.state(held.job_id) == ("queued", "rescued")


async def test_a_claim_ended_its_job_only_if_it_was_not_taken_back(ledger: Ledger) -> None:
    ended, taken = await ledger.held(), await ledger.held()
    assert await ledger.do(lambda s: release.ended_by(s, ended)) is None
    await ledger.do(lambda s: release.end(s, ended, State.SUCCEEDED))
    await ledger.lose(taken.worker_id)
    assert await ledger.do(lambda s: release.ended_by(s, ended)) == "succeeded"
    assert await ledger.do(lambda s: release.ended_by(s, taken)) is None


async def crash(
    ledger: Ledger, job_id: UUID, *, chunk_no: int | None = None
) -> take_back.TakenBack:
    """Let a worker claim the job, commit a chunk if one is named, and die."""
    held = await ledger.claim(job_id, await ledger.add_worker(), alone=True)
    assert held is not None
    if chunk_no is not None:
        await ledger.do(lambda s: chunk.take_receipt(s, held, chunk_no, SPAN))
    [taken] = await ledger.lose(held.worker_id)
    return taken


async def test_a_rescue_costs_no_attempt_and_makes_the_job_due_at_once(ledger: Ledger) -> None:
    job_id = await ledger.add_job()
    taken = await crash(ledger, job_id)
    assert (taken.job_id, taken.state, taken.crashes) == (job_id, "queued", 1)
    assert await ledger.rows(
        "SELECT 1 FROM bulwark.job WHERE id = :id AND attempt = 0 AND reason = 'rescued'"
        " AND run_at <= now() AND next_ring_at <= now()",
        id=job_id,
    )


async def test_after_two_crashes_a_job_is_given_only_to_whoever_runs_it_alone(
    ledger: Ledger,
) -> None:
    job_id, worker_id = await ledger.add_job(), await ledger.add_worker()
    await crash(ledger, job_id)
    assert not await ledger.do(lambda s: job.waits_for_solitude(s, job_id))
    await crash(ledger, job_id)
    assert await ledger.claim(job_id, worker_id) is None
    assert await ledger.do(lambda s: job.waits_for_solitude(s, job_id))
    assert await ledger.claim(job_id, worker_id, alone=True) is not None


async def test_a_job_present_at_three_crashes_is_poisoned(ledger: Ledger) -> None:
    job_id = await ledger.add_job()
    taken = [await crash(ledger, job_id) for _ in range(3)]
    assert [one.state for one in taken] == ["queued", "queued", "failed"]
    assert await ledger.state(job_id) == ("failed", "poisoned")
    [row] = await ledger.rows(
        "SELECT error, finished_at FROM bulwark.job WHERE id = :id", id=job_id
    )
    assert "died 3 times" in row.error
    assert row.finished_at is not None


async def test_a_crash_after_a_committed_chunk_does_not_count(ledger: Ledger) -> None:
    job_id = await ledger.add_job()
    await crash(ledger, job_id)
    await crash(ledger, job_id)
    assert (await crash(ledger, job_id, chunk_no=1)).crashes == 0
    assert (await crash(ledger, job_id)).crashes == 1


async def test_a_job_that_crashes_in_its_first_chunk_is_poisoned_at_the_third_time(
    ledger: Ledger,
) -> None:
    job_id = await ledger.add_job()
    first = await crash(ledger, job_id, chunk_no=chunk.OPENING)
    assert (first.state, first.crashes) == ("queued", 1)
    second = await crash(ledger, job_id)
    assert (second.state, second.crashes) == ("queued", 2)
    assert await ledger.do(lambda s: job.waits_for_solitude(s, job_id))
    third = await crash(ledger, job_id)
    assert (third.state, third.crashes) == ("failed", 3)


async def test_what_a_stopped_worker_left_is_taken_back_without_a_crash(ledger: Ledger) -> None:
    held = await ledger.held()
    await ledger.do(lambda s: worker.deregister(s, held.worker_id))
    assert await ledger.do(worker.unfinished_losses) == [held.worker_id]
    [taken] = await ledger.do(lambda s: take_back.from_worker(s, held.worker_id))
    assert (taken.state, taken.crashes) == ("queued", 0)


async def beat(ledger: Ledger, held: Claim, *claims: UUID) -> list[take_back.TakenBack]:
    assert await ledger.do(lambda s: worker.beat(s, held.worker_id, claims))
    return await ledger.do(take_back.forgotten)


async def test_a_claim_that_its_worker_forgets_twice_is_taken_back(ledger: Ledger) -> None:
    held = await ledger.held()
    assert await beat(ledger, held, held.claim_id) == []
    assert await beat(ledger, held) == []
    [taken] = await beat(ledger, held)
    assert (taken.claim_id, taken.state, taken.crashes) == (held.claim_id, "queued", 0)


async def test_a_claim_that_is_named_in_every_second_beat_is_kept(ledger: Ledger) -> None:
    held = await ledger.held()
    for _ in range(3):
        assert await beat(ledger, held, held.claim_id, uuid4()) == []
        assert await beat(ledger, held, uuid4()) == []
    assert await ledger.state(held.job_id) == ("running", None)


async def test_a_claim_younger_than_two_beats_is_kept(ledger: Ledger) -> None:
    worker_id, job_id = await ledger.add_worker(), await ledger.add_job()
    await ledger.do(lambda s: worker.beat(s, worker_id, []))
    await ledger.do(lambda s: worker.beat(s, worker_id, []))
    held = await ledger.claim(job_id, worker_id)
    assert held is not None
    assert await ledger.do(take_back.forgotten) == []
    assert await beat(ledger, held) == []


async def test_a_forgotten_job_with_an_open_transaction_keeps_no_other_waiting(
    ledger: Ledger,
) -> None:
    busy, other = await ledger.held(), await ledger.held()
    for held in (busy, other):
        await beat(ledger, held, held.claim_id)
    async with ledger.sessions() as open_transaction:
        await job.fence(open_transaction, busy)
        for held in (busy, other):
            for _ in range(2):
                await ledger.do(partial(worker.beat, worker_id=held.worker_id, claims=[]))
        taken = await asyncio.wait_for(ledger.do(take_back.forgotten), 10)
        assert [one.job_id for one in taken] == [other.job_id]
    assert [one.job_id for one in await ledger.do(take_back.forgotten)] == [busy.job_id]


async def test_rows_of_workers_that_ended_long_ago_and_hold_no_job_are_dropped(
    ledger: Ledger,
) -> None:
    holder = (await ledger.held()).worker_id
    long_ago, also, lately = [await ledger.add_worker() for _ in range(3)]
    living = await ledger.add_worker()
    for worker_id, days in ((holder, 8), (long_ago, 8), (also, 8), (lately, 6)):
        await ledger.run(
            "UPDATE bulwark.worker SET ended_at = now() - :days * interval '1 day',"
            " end_reason = 'lost' WHERE id = :id",
            id=worker_id,
            days=days,
        )
    assert [await ledger.do(lambda s: worker.drop_ended(s, 1)) for _ in range(3)] == [1, 1, 0]
    rows = await ledger.rows("SELECT id FROM bulwark.worker")
    assert {row.id for row in rows} == {holder, lately, living}


async def test_a_beat_tells_a_worker_that_it_was_declared_lost(ledger: Ledger) -> None:
    worker_id = await ledger.add_worker()
    assert await ledger.do(lambda s: worker.beat(s, worker_id, []))
    await ledger.lose(worker_id)
    assert not await ledger.do(lambda s: worker.beat(s, worker_id, []))


async def test_a_worker_that_beats_in_time_is_not_declared_lost(ledger: Ledger) -> None:
    worker_id = await ledger.add_worker()
    assert not await ledger.do(lambda s: worker.mark_lost(s, worker_id, timedelta(seconds=15)))
    await ledger.run(
        "UPDATE bulwark.worker SET seen_at = now() - interval '16 s' WHERE id = :id", id=worker_id
    )
    silent = await ledger.do(lambda s: worker.silent_workers(s, timedelta(seconds=15)))
    assert [one.id for one in silent] == [worker_id]
    assert await ledger.do(lambda s: worker.mark_lost(s, worker_id, timedelta(seconds=15)))
    assert not await ledger.do(lambda s: worker.mark_lost(s, worker_id, timedelta(seconds=15)))


@pytest.mark.parametrize("added_by_pgbouncer", ["", " - 255.255.255.255:65535"])
async def test_a_lost_worker_is_unfinished_as_long_as_it_has_a_connection(
    ledger: Ledger, engine: Any, database_url: str, added_by_pgbouncer: str
) -> None:
    worker_id = await ledger.add_worker()
    name = worker.APPLICATION_NAME.format(worker_id=worker_id) + added_by_pgbouncer
    async with ledger.sessions() as its_own:
        await its_own.execute(
            sa.text("SELECT set_config('application_name', :n, false)"), {"n": name}
        )
        assert await ledger.do(worker.unfinished_losses) == []
        await ledger.lose(worker_id)
        assert await ledger.do(worker.unfinished_losses) == [worker_id]
        assert (
            await ledger.do(
                lambda s: worker.terminate_backends(s, worker_id, timedelta(seconds=15))
            )
            == 1
        )
        await until(
            lambda: ledger.rows(
                "SELECT 1 WHERE NOT EXISTS (SELECT FROM pg_stat_activity"
                " WHERE application_name = left(:n, 63))",
                n=name,
            ),
            "the end of the backend",
        )
        assert await ledger.do(worker.unfinished_losses) == []
        await its_own.invalidate()


async def test_a_second_receipt_of_a_chunk_is_refused_with_the_first(ledger: Ledger) -> None:
    held = await ledger.held()
    receipt = Receipt(1, SPAN, filtered=3, counts={"inserted": 2}, detail={"a": 1})
    await ledger.do(lambda s: chunk.take_receipt(s, held, 1, SPAN))
    await ledger.do(lambda s: chunk.fill_receipt(s, held, receipt))
    async with ledger.sessions() as session:
        with pytest.raises(AlreadyCommitted) as refused:
            await chunk.take_receipt(session, held, 1, SPAN)
    assert refused.value.result == receipt
    assert await ledger.do(lambda s: chunk.last_receipt(s, held.job_id)) == receipt


async def test_a_second_receipt_waits_for_a_first_that_is_still_committing(ledger: Ledger) -> None:
    held = await ledger.held()
    async with ledger.sessions() as first, ledger.sessions() as second:
        await chunk.take_receipt(first, held, 1, SPAN)
        waiting = asyncio.create_task(chunk.take_receipt(second, held, 1, SPAN))
        await ledger.someone_waits_for_a_lock()
        await chunk.fill_receipt(first, held, Receipt(1, SPAN, counts={"inserted": 2}))
        await first.commit()
        with pytest.raises(AlreadyCommitted) as refused:
            await waiting
    assert refused.value.result == Receipt(1, SPAN, counts={"inserted": 2})


async def test_a_second_receipt_is_taken_when_the_first_is_rolled_back(ledger: Ledger) -> None:
    held = await ledger.held()
    async with ledger.sessions() as first, ledger.sessions() as second:
        await chunk.take_receipt(first, held, 1, SPAN)
        waiting = asyncio.create_task(chunk.take_receipt(second, held, 1, SPAN))
        await ledger.someone_waits_for_a_lock()
        await first.rollback()
        await waiting
        await second.commit()
    assert await ledger.do(lambda s: chunk.read_receipt(s, held.job_id, 1)) is not None


async def test_the_chunks_of_a_job_add_up(ledger: Ledger) -> None:
    held = await ledger.held()
    for number, counts in ((0, {}), (1, {"inserted": 2}), (2, {"inserted": 1, "rejected": 1})):
        span = Span(number, 0 if number == 0 else 2, 0, number * 20, 1, 1)
        receipt = Receipt(number, span, filtered=number, counts=counts)
        await ledger.do(lambda s, n=number, at=span: chunk.take_receipt(s, held, n, at))  # type: ignore[misc]  # mypy infers no lambda defaults
        await ledger.do(lambda s, one=receipt: chunk.fill_receipt(s, held, one))  # type: ignore[misc]  # mypy infers no lambda defaults
    done = await ledger.do(lambda s: chunk.tally(s, held.job_id))
    assert (done.chunks, done.rows, done.filtered, done.bytes) == (2, 4, 3, 40)
    assert dict(done.counts) == {"inserted": 3, "rejected": 1}


def id_of(instant: datetime) -> UUID:
    """A job id that was made at this instant: its first 48 bits are milliseconds (RFC 9562)."""
    milliseconds = int(instant.timestamp() * 1000)
    return UUID(int=milliseconds << 80 | 7 << 76 | 2 << 62 | uuid4().int & (1 << 60) - 1)


async def record(ledger: Ledger, job_id: UUID) -> None:
    """Write one row into each partitioned table under a claim on this job."""
    held = await ledger.claim(await ledger.add_job(job_id=job_id), await ledger.add_worker())
    assert held is not None
    refused = RowVerdict(1, 1, 2, "rejected", "bad", "age", "too young", b"a,b")
    entry = Entry("insert", "hero", 2, Keys(ranges=[(1, 2)]))
    await ledger.do(lambda s: chunk.take_receipt(s, held, 1, SPAN))
    await ledger.do(lambda s: verdict.write_verdicts(s, job_id, [refused]))
    await ledger.do(lambda s: audit.write_entries(s, held, 1, [entry]))


async def partitions(ledger: Ledger, job_id: UUID) -> set[str]:
    rows = await ledger.rows(
        " UNION ALL ".join(
            f"SELECT tableoid::regclass::text AS at FROM bulwark.{table} WHERE job_id = :id"
            for table in ("chunk", "verdict", "audit")
        ),
        id=job_id,
    )
    return {row.at.removeprefix("bulwark.") for row in rows}


def month_after(instant: datetime, months: int) -> datetime:
    years, month = divmod(instant.month - 1 + months, 12)
    return datetime(instant.year + years, month + 1, 1, tzinfo=UTC)


ENSURE = "SELECT bulwark.ensure_partitions(:months)"


async def test_a_migrated_database_has_the_partitions_of_the_next_months(ledger: Ledger) -> None:
    """Those of the month after the next, too; but the month may have turned since."""
    rows = await ledger.rows("SELECT relname FROM pg_class WHERE relispartition")
    for months in (0, 1):
        suffix = f"{month_after(datetime.now(UTC), months):%Y_%m}"
        assert {f"{table}_{suffix}" for table in ("chunk", "verdict", "audit")} <= {
            row.relname for row in rows
        }


async def test_records_land_in_the_partition_of_their_month(ledger: Ledger) -> None:
    await ledger.run(ENSURE, months=3)
    for months in (0, 1, 3):
        first = month_after(datetime.now(UTC), months)
        for instant in (first, month_after(first, 1) - timedelta(milliseconds=1)):
            job_id = id_of(instant)
            await record(ledger, job_id)
            suffix = f"{first:%Y_%m}"
            assert await partitions(ledger, job_id) == {
                f"{table}_{suffix}" for table in ("chunk", "verdict", "audit")
            }


@pytest.mark.parametrize(
    "job_id",
    [
        id_of(datetime(1999, 12, 31, tzinfo=UTC)),
        id_of(datetime(2999, 1, 1, tzinfo=UTC)),
        UUID("00000000-0000-0000-0000-000000000001"),
        UUID("ffffffff-ffff-ffff-ffff-ffffffffffff"),
    ],
)
async def test_records_of_a_strange_time_land_in_the_default_partition(
    ledger: Ledger, job_id: UUID
) -> None:
    await record(ledger, job_id)
    assert await partitions(ledger, job_id) == {
        "chunk_default",
        "verdict_default",
        "audit_default",
    }
    assert [one.message for one in await ledger.do(lambda s: verdict.read_verdicts(s, job_id))] == [
        "too young"
    ]


COUNT_PARTITIONS = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'bulwark.chunk'::regclass"


async def test_making_partitions_twice_changes_nothing(ledger: Ledger) -> None:
    await ledger.run(ENSURE, months=3)  # the month may have turned since the migration
    [[before]] = await ledger.rows(COUNT_PARTITIONS)
    await ledger.run(ENSURE, months=3)
    assert await ledger.rows(COUNT_PARTITIONS) == [(before,)]
    await ledger.run(ENSURE, months=5)
    await ledger.run(ENSURE, months=5)
    assert await ledger.rows(COUNT_PARTITIONS) == [(before + 2,)]


async def test_a_month_whose_records_are_in_the_default_partition_keeps_them(
    ledger: Ledger,
) -> None:
    job_id = id_of(month_after(datetime.now(UTC), 5))
    await record(ledger, job_id)
    await ledger.run(ENSURE, months=6)
    assert "chunk_default" in await partitions(ledger, job_id)
    later = id_of(month_after(datetime.now(UTC), 6))
    await record(ledger, later)
    assert "chunk_default" not in await partitions(ledger, later)


async def test_no_sensitive_value_leaves_the_audit(ledger: Ledger) -> None:
    job_id = new_job_id()
    await record(ledger, job_id)
    await ledger.run(
        """UPDATE bulwark.audit SET before = '{"name": "Clark"}',
           before_sensitive = '{"secret_name": "Kal-El"}' WHERE job_id = :id""",
        id=job_id,
    )
    of_job = await ledger.do(lambda s: audit.read_entries(s, job_id=job_id))
    of_table = await ledger.do(lambda s: audit.read_entries(s, table_name="hero"))
    assert of_job == of_table
    assert "Clark" in str(of_job)
    assert "Kal-El" not in str(of_job)
    assert "sensitive" not in str(of_job)


async def test_an_audit_entry_names_the_transaction_that_made_the_change(ledger: Ledger) -> None:
    held = await ledger.held()

    async def change(session: AsyncSession) -> str:
        entry = Entry("insert", "hero", 1, Keys(keys=[("a",)]))
        await audit.write_entries(session, held, 1, [entry])
        return str(await session.scalar(sa.text("SELECT pg_current_xact_id()::text")))

    xid = await ledger.do(change)
    [entry] = await ledger.do(lambda s: audit.read_entries(s, job_id=held.job_id))
    assert entry["xid"] == xid
    assert (entry["actor"], entry["claim_id"]) == ("ann", held.claim_id)
    assert entry["keys"] == {"keys": [["a"]]}
