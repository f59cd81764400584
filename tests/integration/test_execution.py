"""Whatever becomes of a run, its effect and its ending are committed once and together, or not."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from structlog.testing import capture_logs

from db.engine import PoolProfile, create_engine, make_sessions
from db.ledger import worker
from db.ledger.take_back import from_worker
from db.transaction import transaction
from jobs._declaration import Job, Outcome, Payload, chunked_job
from jobs._declaration import job as single_job
from jobs._discovery import Jobs, discover_jobs
from jobs._producer import new_job_id
from jobs._run import ChunkedRun
from tests.inprocess import Bench
from tests.own_servers import own_postgres
from tests.proxy import BREAKS, Cut, proxied
from tests.sample_jobs.act_out import ADD_NOTE, BAD_ROWS, ActOut, Deed
from tests.sample_jobs.write_notes import WriteNotes
from tests.stage import SAMPLE_JOBS, Stage
from tests.workers import ROOT, until
from worker import solitude
from worker.executor import Executor

Sessions = async_sessionmaker[AsyncSession]


async def accept(bench: Bench, payload: Payload, **terms: Any) -> UUID:
    return (await bench.producer.enqueue(payload, **terms)).job_id


async def test_a_job_that_returns_commits_its_effect_and_its_end(
    stage: Stage, bench: Bench
) -> None:
    job_id = await bench.run(ActOut(note="hello"))
    row = await stage.row(job_id)
    assert (row["state"], row["reason"], row["error"]) == ("succeeded", None, None)
    assert row["outcome"] == '{"note": "hello"}'
    assert row["finished_at"] >= row["started_at"]
    assert await stage.notes() == ["hello"]


async def test_a_rejected_job_fails_at_once_and_leaves_no_effect(
    stage: Stage, bench: Bench
) -> None:
    job_id = await bench.run(ActOut(then="reject"))
    assert await stage.ended_as(job_id) == ("failed", "rejected", 1)
    assert (await stage.row(job_id))["error"] == "no such club"
    assert await stage.notes() == []


async def test_a_refusal_leaves_its_verdicts_with_the_failure_of_the_job(
    stage: Stage, bench: Bench
) -> None:
    job_id = await bench.run(ActOut(then="reject_rows"))
    assert await stage.ended_as(job_id) == ("failed", "rejected", 1)
    row = await stage.row(job_id)
    assert row["error"] == "2 of 3 rows are bad"
    assert row["outcome"] == '{"verdicts": {"rejected": 2, "not_reached": 1}}'
    written = await bench.verdicts(job_id)
    assert written == [replace(BAD_ROWS[0], message="no room for \\0"), BAD_ROWS[1]]
    assert await stage.notes() == []


async def test_a_reason_that_postgresql_cannot_hold_is_told_in_other_signs(
    stage: Stage, bench: Bench
) -> None:
    job_id = await bench.run(ActOut(then="reject_oddly"))
    assert await stage.ended_as(job_id) == ("failed", "rejected", 1)
    assert (await stage.row(job_id))["error"] == "a NUL \\0 and half a pair \\ud800"


async def test_a_job_that_asks_for_later_is_put_off_at_no_cost(stage: Stage, bench: Bench) -> None:
    job_id = await bench.run(ActOut(then="put_off", seconds=600))
    assert await stage.ended_as(job_id) == ("queued", "deferred", 0)
    wait_s = await stage.value(
        "SELECT extract(epoch FROM run_at - now())::float FROM bulwark.job WHERE id = $1", job_id
    )
    assert wait_s == pytest.approx(600, abs=30)
    assert await stage.notes() == []


async def test_a_job_is_put_off_only_so_long_after_its_first_start(
    stage: Stage, bench: Bench
) -> None:
    job_id = await bench.run(ActOut(then="put_off"))
    await stage.value(
        "UPDATE bulwark.job SET started_at = now() - interval '61 min', run_at = now()"
        " WHERE id = $1",
        job_id,
    )
    await (await bench.register()).deliver(job_id)
    assert await stage.ended_as(job_id) == ("failed", "too_old", 1)
    assert "the club is closed" in (await stage.row(job_id))["error"]


async def test_a_job_that_was_enqueued_long_before_its_time_may_still_be_put_off(
    stage: Stage, bench: Bench
) -> None:
    job_id = await accept(bench, ActOut(then="put_off"))
    await stage.value(
        "UPDATE bulwark.job SET created_at = now() - interval '3 days' WHERE id = $1", job_id
    )
    await (await bench.register()).deliver(job_id)
    assert await stage.ended_as(job_id) == ("queued", "deferred", 0)


async def test_any_other_error_is_retried_after_a_backoff_until_attempts_are_used_up(
    stage: Stage, bench: Bench
) -> None:
    executor = await bench.register()
    job_id = await accept(bench, ActOut(then="fail"))
    for attempt in (1, 2):
        await executor.deliver(job_id)
        assert await stage.ended_as(job_id) == ("queued", "retry", attempt)
        assert (await stage.row(job_id))["error"] == "ValueError: the dice fell badly"
        await stage.make_due(job_id)
    await executor.deliver(job_id)
    assert await stage.ended_as(job_id) == ("failed", "attempts_exhausted", 3)
    await stage.make_due(job_id)
    await executor.deliver(job_id)
    assert await stage.ended_as(job_id) == ("failed", "attempts_exhausted", 3)
    assert await stage.notes() == []


async def test_an_attempt_after_a_failure_waits_for_its_backoff(stage: Stage, bench: Bench) -> None:
    job_id = await bench.run(ActOut(then="fail"))
    await stage.value(
        "UPDATE bulwark.job SET run_at = now() + interval '1 h' WHERE id = $1", job_id
    )
    await (await bench.register()).deliver(job_id)
    assert await stage.ended_as(job_id) == ("queued", "retry", 1)


async def test_a_job_that_runs_too_long_is_stopped_and_says_so(stage: Stage, bench: Bench) -> None:
    executor = await bench.register()
    job_id = await accept(bench, ActOut(then="hang"), timeout_s=1, attempts=2)
    await executor.deliver(job_id)
    assert await stage.ended_as(job_id) == ("queued", "timed_out", 1)
    assert (await stage.row(job_id))["error"] == "it ran longer than 1 s"
    await stage.make_due(job_id)
    await executor.deliver(job_id)
    assert await stage.ended_as(job_id) == ("failed", "timed_out", 2)
    assert await stage.notes() == []


async def test_a_job_that_breaks_a_constraint_fails_its_attempt_without_naming_values(
    stage: Stage, bench: Bench
) -> None:
    job_id = await bench.run(ActOut(then="break_a_constraint"))
    assert await stage.ended_as(job_id) == ("queued", "retry", 1)
    error = (await stage.row(job_id))["error"]
    assert error.startswith("UniqueViolationError: ")
    assert "(A)" not in error
    assert await stage.notes() == []


@pytest.mark.parametrize(
    ("deed", "error"),
    [
        ("exit", "the game is over"),
        ("put_off_oddly", "put off by a timedelta, not by 'a moment'"),
        ("commit", "may not commit or roll back its session"),
    ],
)
async def test_a_job_that_ends_as_no_job_may_fails_its_attempt_and_leaves_nothing(
    stage: Stage, bench: Bench, deed: Deed, error: str
) -> None:
    job_id = await bench.run(ActOut(then=deed))
    row = await stage.row(job_id)
    assert (row["state"], row["reason"], row["attempt"]) == ("queued", "retry", 1)
    assert error in row["error"]
    assert await stage.notes() == []


async def test_a_job_that_cancels_itself_fails_its_attempt(stage: Stage, bench: Bench) -> None:
    job_id = await bench.run(ActOut(then="cancel_itself"))
    assert await stage.ended_as(job_id) == ("queued", "retry", 1)


async def test_an_outcome_that_json_cannot_hold_is_the_error_of_its_attempt(
    stage: Stage, bench: Bench
) -> None:
    for payload in (
        ActOut(then="return_an_object"),
        WriteNotes(chunks=1, return_an_object=True),
    ):
        job_id = await bench.run(payload)
        assert await stage.ended_as(job_id) == ("queued", "retry", 1)
        assert "object" in (await stage.row(job_id))["error"]
    assert await stage.notes() == ["chunk 1"]


async def test_a_payload_with_an_unknown_field_is_rejected_by_its_name(
    stage: Stage, bench: Bench
) -> None:
    job_id = await accept(bench, ActOut())
    await stage.value(
        """UPDATE bulwark.job SET payload = '{"nota": "Kal-El"}' WHERE id = $1""", job_id
    )
    await (await bench.register()).deliver(job_id)
    assert await stage.ended_as(job_id) == ("failed", "rejected", 1)
    error = (await stage.row(job_id))["error"]
    assert "nota" in error
    assert "Kal-El" not in error


async def test_a_job_that_this_worker_does_not_know_is_tried_again_later(
    stage: Stage, bench: Bench
) -> None:
    job_id = await accept(bench, ActOut())
    await stage.value("UPDATE bulwark.job SET kind = 'act_ou' WHERE id = $1", job_id)
    await (await bench.register()).deliver(job_id)
    assert await stage.ended_as(job_id) == ("queued", "retry", 1)
    assert "did you mean 'act_out'?" in (await stage.row(job_id))["error"]


async def test_a_delivery_that_comes_twice_or_late_does_nothing(stage: Stage, bench: Bench) -> None:
    executor = await bench.register()
    for payload in (ActOut(), ActOut(then="reject"), WriteNotes(chunks=2)):
        job_id = await accept(bench, payload)
        await executor.deliver(job_id)
        before = await stage.row(job_id)
        await executor.deliver(job_id)
        assert await stage.row(job_id) == before
    assert await stage.notes() == ["done", "chunk 1", "chunk 2"]


async def test_a_delivery_of_a_job_that_is_not_there_does_nothing(
    stage: Stage, bench: Bench
) -> None:
    await (await bench.register()).deliver(new_job_id())
    assert await stage.notes() == []


async def test_many_deliveries_at_once_run_the_job_once(stage: Stage, bench: Bench) -> None:
    executor = await bench.register()
    for payload in (ActOut(), WriteNotes(chunks=2)):
        job_id = await accept(bench, payload)
        await asyncio.gather(*(executor.deliver(job_id) for _ in range(5)))
        assert (await stage.row(job_id))["state"] == "succeeded"
    assert await stage.notes() == ["done", "chunk 1", "chunk 2"]


async def begin(executor: Executor, stage: Stage, job_id: UUID) -> asyncio.Task[None]:
    """Deliver the job, and return when it waits at the closed gate."""
    await stage.close_gate()
    delivery = asyncio.create_task(executor.deliver(job_id))
    await stage.somebody_at_gate()
    return delivery


@pytest.mark.parametrize("payload", [ActOut(gate=True), WriteNotes(chunks=3, gate_in=2)])
async def test_a_cancelled_delivery_gives_its_job_back_and_another_goes_on(
    stage: Stage, bench: Bench, payload: Payload
) -> None:
    executor, job_id = await bench.register(), await accept(bench, payload)
    delivery = await begin(executor, stage, job_id)
    delivery.cancel()
    await asyncio.wait([delivery])
    await executor.settle()
    assert delivery.cancelled()
    assert await stage.ended_as(job_id) == ("queued", "given_back", 0)
    await stage.open_gate()
    bench.worker_id = uuid4()
    await (await bench.register()).deliver(job_id)
    assert await stage.ended_as(job_id) == ("succeeded", None, 0)
    single = isinstance(payload, ActOut)
    assert await stage.notes() == (["done"] if single else ["chunk 1", "chunk 2", "chunk 3"])


class HoldUp(Payload):
    """Asks to be held up inside the test's own process."""

    note: str


class OwnJobs:
    """A bench with a job that tells the test when it runs, and waits until the test lets it go."""

    def __init__(self, sessions: Sessions, url: str, *, chunked: bool = False) -> None:
        self.running: dict[str, asyncio.Event] = {}
        self.may_end: dict[str, asyncio.Event] = {}

        async def held_up(session: AsyncSession, payload: HoldUp) -> Outcome:
            await self._hold(payload)
            await session.execute(ADD_NOTE, {"text": payload.note})
            return None

        async def held_up_in_chunks(_: ChunkedRun, payload: HoldUp) -> Outcome:
            await self._hold(payload)
            return {"note": payload.note}

        declared: Job[HoldUp]
        declared = chunked_job()(held_up_in_chunks) if chunked else single_job()(held_up)
        self.bench = Bench(sessions, url, Jobs([declared]))

    async def _hold(self, payload: HoldUp) -> None:
        self.running[payload.note].set()
        await self.may_end[payload.note].wait()

    async def accept(self, note: str) -> UUID:
        self.running[note], self.may_end[note] = asyncio.Event(), asyncio.Event()
        return await accept(self.bench, HoldUp(note=note))


@pytest.fixture
def own_jobs(sessions: Sessions, database_url: str) -> OwnJobs:
    return OwnJobs(sessions, database_url)


TERMINATE_FENCED = """
    SELECT pg_terminate_backend(pid) FROM pg_locks
     WHERE relation = 'bulwark.job'::regclass AND mode = 'RowShareLock'
"""


async def test_a_job_that_was_taken_back_while_it_ran_changes_nothing(
    stage: Stage, own_jobs: OwnJobs
) -> None:
    executor, job_id = await own_jobs.bench.register(), await own_jobs.accept("a")
    with capture_logs() as logs:
        delivery = asyncio.create_task(executor.deliver(job_id))
        await own_jobs.running["a"].wait()
        taking = asyncio.create_task(take_back(own_jobs.bench.sessions, executor.worker_id))
        await taking_waits(stage)
        await stage.value(TERMINATE_FENCED)
        await taking
        own_jobs.may_end["a"].set()
        await delivery
    assert "job.claim_lost" in {line["event"] for line in logs}
    assert "job.succeeded" not in {line["event"] for line in logs}
    assert await stage.ended_as(job_id) == ("queued", "rescued", 0)
    assert await stage.notes() == []


async def take_back(sessions: Sessions, worker_id: UUID) -> None:
    async def lose(session: AsyncSession) -> None:
        await worker.deregister(session, worker_id)
        await from_worker(session, worker_id)

    await transaction(sessions, lose, name="test", receipted=True)


async def taking_waits(stage: Stage) -> None:
    async def waits() -> Any:
        return await stage.value("SELECT count(*) FROM pg_locks WHERE NOT granted")

    await until(waits, "the rescue waits for the fenced transaction")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No suspect gives up waiting for its solitude."""
    monkeypatch.setattr(solitude, "SOLITUDE_WAIT_S", 60.0)


@pytest.mark.usefixtures("patient")
async def test_a_suspect_runs_alone(stage: Stage, own_jobs: OwnJobs) -> None:
    executor = await own_jobs.bench.register()
    ids = {note: await own_jobs.accept(note) for note in ("before", "suspect", "after")}
    await stage.value("UPDATE bulwark.job SET crashes = 2 WHERE id = $1", ids["suspect"])
    first = asyncio.create_task(executor.deliver(ids["before"]))
    await own_jobs.running["before"].wait()
    suspect = asyncio.create_task(executor.deliver(ids["suspect"]))
    await until(lambda: _true(executor.solitude._alone), "the suspect asks for solitude")
    last = asyncio.create_task(executor.deliver(ids["after"]))
    assert (await stage.row(ids["suspect"]))["state"] == "queued"
    own_jobs.may_end["before"].set()
    await own_jobs.running["suspect"].wait()
    assert not own_jobs.running["after"].is_set()
    own_jobs.may_end["suspect"].set()
    await own_jobs.running["after"].wait()
    own_jobs.may_end["after"].set()
    await asyncio.gather(first, suspect, last)
    assert await stage.notes() == ["before", "suspect", "after"]


async def test_a_busy_worker_does_not_stay_closed_for_a_suspect_that_another_runs(
    stage: Stage, own_jobs: OwnJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solitude, "SOLITUDE_WAIT_S", 0.5)
    busy = await own_jobs.bench.register()
    own_jobs.bench.worker_id = uuid4()
    idle = await own_jobs.bench.register()
    ids = {note: await own_jobs.accept(note) for note in ("long", "suspect", "after")}
    await stage.value("UPDATE bulwark.job SET crashes = 2 WHERE id = $1", ids["suspect"])
    long = asyncio.create_task(busy.deliver(ids["long"]))
    await own_jobs.running["long"].wait()
    waiting = asyncio.create_task(busy.deliver(ids["suspect"]))
    await until(lambda: _true(busy.solitude._alone), "the suspect asks for solitude")
    elsewhere = asyncio.create_task(idle.deliver(ids["suspect"]))
    await own_jobs.running["suspect"].wait()
    after = asyncio.create_task(busy.deliver(ids["after"]))
    await asyncio.wait_for(own_jobs.running["after"].wait(), 10)
    await asyncio.wait_for(waiting, 10)
    for note in ("long", "suspect", "after"):
        own_jobs.may_end[note].set()
    await asyncio.gather(long, elsewhere, after)
    assert await stage.ended_as(ids["suspect"]) == ("succeeded", None, 0)
    assert sorted(await stage.notes()) == ["after", "long", "suspect"]


async def two_suspects_behind_another(
    stage: Stage, own_jobs: OwnJobs
) -> tuple[Executor, dict[str, UUID], list[asyncio.Task[None]]]:
    """A job that runs, one suspect that waits for its end, and one that has given up."""
    executor = await own_jobs.bench.register()
    ids = {note: await own_jobs.accept(note) for note in ("before", "first", "second")}
    await stage.value(
        "UPDATE bulwark.job SET crashes = 2 WHERE id = ANY($1)", [ids["first"], ids["second"]]
    )
    before = asyncio.create_task(executor.deliver(ids["before"]))
    await own_jobs.running["before"].wait()
    suspects = [asyncio.create_task(executor.deliver(ids[note])) for note in ("first", "second")]
    done, waiting = await asyncio.wait(suspects, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    assert (len(done), len(waiting)) == (1, 1)
    return executor, ids, [before, *suspects]


@pytest.mark.usefixtures("patient")
async def test_of_two_suspects_one_waits_for_solitude_and_the_other_gives_up_at_once(
    stage: Stage, own_jobs: OwnJobs
) -> None:
    executor, ids, deliveries = await two_suspects_behind_another(stage, own_jobs)
    own_jobs.may_end["before"].set()
    for note in ("first", "second"):
        own_jobs.may_end[note].set()
    await asyncio.gather(*deliveries)
    states = {(await stage.row(ids[note]))["state"]: ids[note] for note in ("first", "second")}
    assert sorted(states) == ["queued", "succeeded"]
    assert executor.unclaimed == {states["queued"]}, "it is rung again, now that there is room"


@pytest.mark.usefixtures("patient")
async def test_suspects_that_came_in_vain_are_rung_again_when_the_worker_stops(
    stage: Stage, own_jobs: OwnJobs
) -> None:
    executor, ids, deliveries = await two_suspects_behind_another(stage, own_jobs)
    executor.stop()
    await asyncio.gather(*deliveries, return_exceptions=True)
    assert executor.unclaimed == set(ids.values())


@pytest.mark.usefixtures("patient")
async def test_suspects_that_came_in_vain_are_rung_again_when_one_gives_itself_back(
    stage: Stage, bench: Bench
) -> None:
    executor = await bench.register()
    first = await accept(bench, ActOut(gate=True))
    ids = [await accept(bench, WriteNotes(chunks=2)) for _ in range(2)]
    await stage.value("UPDATE bulwark.job SET crashes = 2 WHERE id = ANY($1)", ids)
    await stage.close_gate()
    before = asyncio.create_task(executor.deliver(first))
    await stage.somebody_at_gate()
    suspects = [asyncio.create_task(executor.deliver(one)) for one in ids]
    await asyncio.wait(suspects, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    executor.stop_at_chunks()
    await stage.open_gate()
    await asyncio.gather(before, *suspects)
    assert await stage.notes() == ["done"]
    assert executor.unclaimed == set(ids)


async def _true(value: bool) -> bool:
    return value


async def test_a_claim_whose_answer_was_lost_is_found_again(
    stage: Stage, database_url: str
) -> None:
    async with through_proxy(database_url) as (proxy, bench):
        executor, job_id = await bench.register(), await accept(bench, ActOut())
        proxy.arm(Cut.ANSWER)
        await executor.deliver(job_id)
        assert proxy.cuts == [Cut.ANSWER]
    assert await stage.ended_as(job_id) == ("succeeded", None, 0)
    assert await stage.notes() == ["done"]


BESIDES = {"transaction.replayed", "job.raised", "chunk.committed"}


@pytest.mark.parametrize("cut", BREAKS)
@pytest.mark.parametrize(
    ("payload", "commits", "end", "told", "notes"),
    [
        (ActOut(gate=True), 1, ("succeeded", None, 0), "job.succeeded", ["done"]),
        (ActOut(gate=True, then="reject"), 1, ("failed", "rejected", 1), "job.failed", []),
        (ActOut(gate=True, then="reject_rows"), 1, ("failed", "rejected", 1), "job.failed", []),
        (ActOut(gate=True, then="fail"), 1, ("queued", "retry", 1), "job.retried", []),
        (WriteNotes(chunks=1, gate_in=1), 2, ("succeeded", None, 0), "job.succeeded", ["chunk 1"]),
    ],
)
async def test_a_commit_without_an_answer_is_settled_exactly_once(
    stage: Stage,
    database_url: str,
    payload: Payload,
    commits: int,
    end: tuple[str, str | None, int],
    told: str,
    notes: list[str],
    cut: Cut,
) -> None:
    async with through_proxy(database_url) as (proxy, bench):
        executor, job_id = await bench.register(), await accept(bench, payload)
        delivery = await begin(executor, stage, job_id)
        proxy.arm(*[cut] * commits)
        with capture_logs() as logs:
            await stage.open_gate()
            await delivery
        ends = [line["event"] for line in logs if line["event"] not in BESIDES]
        assert ends == [told]
        assert proxy.cuts == [cut] * commits
        rows_in_need = len(BAD_ROWS) if payload == ActOut(gate=True, then="reject_rows") else 0
        assert len(await bench.verdicts(job_id)) == rows_in_need
    assert await stage.ended_as(job_id) == end
    assert await stage.notes() == notes


@asynccontextmanager
async def through_proxy(url: str) -> AsyncIterator[tuple[Any, Bench]]:
    """A bench whose connections all go through a proxy that can cut them."""
    async with proxied(url) as (proxy, proxied_url):
        engine = create_engine(
            proxied_url, profile=PoolProfile.LIGHT, application_name="test_execution"
        )
        yield proxy, Bench(make_sessions(engine), proxied_url, discover_jobs(SAMPLE_JOBS))
        await engine.dispose()


async def test_an_outcome_waits_in_memory_until_postgresql_is_back() -> None:
    with own_postgres() as postgres:
        config = Config(ROOT / "alembic.ini")
        config.attributes["database_url"] = postgres.url
        await asyncio.to_thread(command.upgrade, config, "head")
        engine = create_engine(
            postgres.url, profile=PoolProfile.LIGHT, application_name="test_execution"
        )
        own_jobs = OwnJobs(make_sessions(engine), postgres.url, chunked=True)
        executor, job_id = await own_jobs.bench.register(), await own_jobs.accept("a")
        with capture_logs() as logs:
            delivery = asyncio.create_task(executor.deliver(job_id))
            await own_jobs.running["a"].wait()
            await asyncio.to_thread(postgres.stop)
            own_jobs.may_end["a"].set()
            await until(
                lambda: _true(any(line["event"] == "job.outcome_waits" for line in logs)),
                "the outcome waits",
            )
            await asyncio.to_thread(postgres.start)
            await delivery
        row = await own_jobs.bench.job(job_id)
        assert (row.state, row.attempt, row.outcome) == ("succeeded", 0, {"note": "a"})
        await engine.dispose()
