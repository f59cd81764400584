"""A job that is cancelled goes no further, and says what it has committed."""

import asyncio
import json
import signal
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from pydantic import JsonValue
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from jobs._declaration import Payload
from jobs._discovery import discover_jobs
from jobs._producer import Producer
from jobs.insert_rows import InsertRows
from tests.command_line import Cli, make_cli, sentence
from tests.sample_jobs.act_out import GATE, ActOut
from tests.sample_jobs.take_down import TakeDown
from tests.sample_jobs.write_notes import WriteNotes
from tests.stage import SAMPLE_JOBS, Stage
from tests.workers import Start, WorkerProcess, environment, let_redis_be_known, until

QUICK = {"job_modules": ",".join(SAMPLE_JOBS), "relay_interval_s": "0.1", "log_format": "json"}
NAMES = [f"team {number}" for number in range(1, 11)]
GATED_NAMES = (
    f"""CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql
        AS $$ BEGIN PERFORM pg_advisory_xact_lock_shared({GATE}); RETURN NEW; END $$""",
    """CREATE TRIGGER gate BEFORE INSERT ON team FOR EACH ROW
        WHEN (NEW.name = 'team 5') EXECUTE FUNCTION wait_at_gate()""",
)
"""The third chunk of two rows waits."""


class Scene:
    """A worker that has taken what was enqueued, and the command line beside it."""

    def __init__(self, env: dict[str, str], start: Start, stage: Stage, producer: Producer) -> None:
        self._env = env
        self._start = start
        self.stage = stage
        self.producer = producer
        self.cli: Cli = make_cli(env["BULWARK_DATABASE_URL"], env["BULWARK_REDIS_URL"])

    def worker(self) -> WorkerProcess:
        return self._start(self._env)

    async def let_redis_be_known(self) -> None:
        await let_redis_be_known(self._env, self._start)

    async def accept(self, payload: Payload) -> UUID:
        return (await self.producer.enqueue(payload)).job_id

    async def cancel(self, job_id: UUID, *words: str) -> dict[str, Any]:
        """What the command says as JSON."""
        result = await asyncio.to_thread(self.cli, "cancel", str(job_id), *words, "--json")
        assert result.stdout, result.stderr
        document: dict[str, Any] = json.loads(result.stdout)
        return document

    async def report(self, job_id: UUID) -> dict[str, Any]:
        result = await asyncio.to_thread(self.cli, "job", str(job_id), "--json")
        document: dict[str, Any] = json.loads(result.stdout)
        return document


@pytest.fixture
def scene(
    start: Start,
    stage: Stage,
    sessions: async_sessionmaker[AsyncSession],
    database_url: str,
    redis_url: str,
) -> Scene:
    env = environment(database_url, redis_url, **QUICK)
    return Scene(env, start, stage, Producer(sessions, discover_jobs(SAMPLE_JOBS)))


async def names_in(connection: asyncpg.Connection) -> Sequence[str]:
    return [row["name"] for row in await connection.fetch("SELECT name FROM team ORDER BY id")]


def teams(**request: Any) -> InsertRows:
    rows: list[dict[str, JsonValue]] = [{"name": name} for name in NAMES]
    return InsertRows(table="team", rows=rows, chunk_rows=2, **request)


async def test_a_job_that_waits_is_cancelled_by_the_command_itself(scene: Scene) -> None:
    job_id = await scene.accept(teams())

    told = await scene.cancel(job_id, "--actor", "Zoë")
    again = await scene.cancel(job_id)
    scene.worker()
    await scene.stage.becomes(await scene.accept(ActOut(note="later")), "succeeded")

    assert told == again == {"job_id": str(job_id), "state": "cancelled"}
    assert await scene.stage.notes() == ["later"]
    report = await scene.report(job_id)
    assert (report["error"], report["started_at"]) == ("cancelled by Zoë", None)
    assert (report["verdicts"], report["adds_up"]) == ({}, False)


async def test_a_running_job_stops_at_its_next_chunk_and_counts_the_rest(
    scene: Scene, connection: asyncpg.Connection
) -> None:
    for statement in GATED_NAMES:
        await connection.execute(statement)
    await scene.stage.close_gate()
    worker = scene.worker()
    job_id = await scene.accept(teams())
    await scene.stage.somebody_at_gate()

    told = await scene.cancel(job_id)
    await scene.stage.open_gate()
    await scene.stage.becomes(job_id, "cancelled")

    assert told["state"] == "running"
    assert await names_in(connection) == NAMES[:6]
    report = await scene.report(job_id)
    assert report["verdicts"] == {"inserted": 6, "not_reached": 4}
    assert report["adds_up"]
    assert (report["attempt"], report["reason"]) == (0, None)

    async def told_so() -> bool:
        return "job.cancelled" in worker.told()

    await until(told_so, "the worker says that the job is cancelled")


async def test_a_running_job_is_stopped_at_once_in_the_midst_of_a_statement(
    scene: Scene, connection: asyncpg.Connection
) -> None:
    for statement in GATED_NAMES:
        await connection.execute(statement)
    await scene.stage.close_gate()
    scene.worker()
    job_id = await scene.accept(teams())
    await scene.stage.somebody_at_gate()

    told = await scene.cancel(job_id, "--now", "--wait")

    assert (told["state"], told["verdicts"]) == ("cancelled", {"inserted": 4, "not_reached": 6})
    assert told["adds_up"]
    assert await names_in(connection) == NAMES[:4]
    assert (await scene.stage.value("SELECT count(*) FROM bulwark.audit")) == 2


async def test_an_atomic_job_that_is_cancelled_has_written_nothing(
    scene: Scene, connection: asyncpg.Connection
) -> None:
    for statement in GATED_NAMES:
        await connection.execute(statement)
    await scene.stage.close_gate()
    scene.worker()
    job_id = await scene.accept(teams(atomic=True))
    await scene.stage.somebody_at_gate()

    await scene.cancel(job_id)
    await scene.stage.open_gate()
    await scene.stage.becomes(job_id, "cancelled")

    assert await names_in(connection) == []
    report = await scene.report(job_id)
    assert (report["verdicts"], report["adds_up"]) == ({"not_reached": 10}, True)


async def test_a_job_that_was_given_back_is_ended_by_whoever_claims_it(
    scene: Scene, connection: asyncpg.Connection
) -> None:
    for statement in GATED_NAMES:
        await connection.execute(statement)
    await scene.stage.close_gate()
    first = scene.worker()
    job_id = await scene.accept(teams())
    await scene.stage.somebody_at_gate()
    first.signal(signal.SIGTERM)
    first.signal(signal.SIGTERM)
    await scene.stage.becomes(job_id, "queued")

    told = await scene.cancel(job_id)
    scene.worker()
    await scene.stage.becomes(job_id, "cancelled")

    assert told["state"] == "queued"
    assert await names_in(connection) == NAMES[:4]
    report = await scene.report(job_id)
    assert (report["verdicts"], report["adds_up"]) == ({"inserted": 4, "not_reached": 6}, True)


async def test_a_job_of_one_transaction_is_stopped_at_once_and_its_worker_goes_on(
    scene: Scene,
) -> None:
    worker = scene.worker()
    job_id = await scene.accept(ActOut(then="hang"))
    await scene.stage.becomes(job_id, "running")

    told = await scene.cancel(job_id, "--now", "--wait")
    await scene.stage.becomes(await scene.accept(ActOut(note="healthy")), "succeeded")

    assert (told["state"], told["outcome"]) == ("cancelled", None)
    assert await scene.stage.notes() == ["healthy"]
    assert worker.terminate() == 0


async def test_a_cancelled_job_that_puts_itself_off_ends_now(scene: Scene) -> None:
    await scene.stage.close_gate()
    scene.worker()
    job_id = await scene.accept(ActOut(gate=True, then="put_off", seconds=3600))
    await scene.stage.somebody_at_gate()

    told = await scene.cancel(job_id)
    await scene.stage.open_gate()
    await scene.stage.becomes(job_id, "cancelled")

    assert told["state"] == "running"
    assert await scene.stage.notes() == []


async def test_a_job_in_a_batch_is_stopped_at_once_and_the_others_do_their_work_once(
    scene: Scene,
) -> None:
    orders = [TakeDown(note="a"), TakeDown(note="b", then="hang_together"), TakeDown(note="c")]
    await scene.let_redis_be_known()
    accepted = await scene.producer.enqueue_many(orders, timeout_s=600)
    first, second, third = [one.job_id for one in accepted]
    worker = scene.worker()
    await scene.stage.becomes(third, "running")

    told = await scene.cancel(first, "--now")
    await scene.stage.becomes(first, "cancelled")
    for job_id in (second, third):
        await scene.stage.becomes(job_id, "succeeded")

    assert told["state"] == "running"
    assert await scene.stage.notes() == ["b", "c"]
    assert [await scene.stage.ended_as(one) for one in (second, third)] == [
        ("succeeded", None, 0)
    ] * 2
    assert worker.terminate() == 0


async def test_a_job_that_commits_before_it_hears_of_it_has_succeeded(scene: Scene) -> None:
    await scene.stage.close_gate()
    scene.worker()
    job_id = await scene.accept(ActOut(gate=True))
    await scene.stage.somebody_at_gate()

    told = await scene.cancel(job_id)
    await scene.stage.open_gate()
    await scene.stage.becomes(job_id, "succeeded")

    assert told["state"] == "running"
    assert await scene.stage.notes() == ["done"]
    refused = await asyncio.to_thread(scene.cli, "cancel", str(job_id))
    assert refused.exit_code == 2
    assert "has succeeded already" in sentence(refused)


async def test_a_cancelled_job_goes_on_where_it_was_when_it_is_retried(scene: Scene) -> None:
    await scene.stage.close_gate()
    scene.worker()
    job_id = await scene.accept(WriteNotes(chunks=3, gate_in=2))
    await scene.stage.somebody_at_gate()
    await scene.cancel(job_id, "--now", "--wait")
    await scene.stage.open_gate()

    result = await asyncio.to_thread(scene.cli, "retry", str(job_id))
    await scene.stage.becomes(job_id, "succeeded")

    assert result.exit_code == 0
    assert await scene.stage.notes() == ["chunk 1", "chunk 2", "chunk 3"]


async def test_a_job_that_fails_before_it_hears_of_it_counts_the_rest_all_the_same(
    scene: Scene, connection: asyncpg.Connection
) -> None:
    await connection.execute("INSERT INTO team (name) VALUES ('team 6')")
    for statement in GATED_NAMES:
        await connection.execute(statement)
    await scene.stage.close_gate()
    scene.worker()
    job_id = await scene.accept(teams(max_rejects=0))
    await scene.stage.somebody_at_gate()

    await scene.cancel(job_id)
    await scene.stage.open_gate()
    await scene.stage.becomes(job_id, "failed")

    report = await scene.report(job_id)
    assert report["verdicts"] == {"inserted": 5, "rejected": 1, "not_reached": 4}
    assert report["adds_up"]


async def test_cancellations_of_ended_jobs_are_forgotten(scene: Scene) -> None:
    job_id = await scene.accept(ActOut())
    await scene.cancel(job_id)
    scene.worker()

    async def forgotten() -> bool:
        return not await scene.stage.value("SELECT count(*) FROM bulwark.cancellation")

    await until(forgotten, "the cancellation is tidied away")
