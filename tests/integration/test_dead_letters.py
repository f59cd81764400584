"""Jobs that have failed for good are kept, listed, and can be run again."""

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from pydantic import JsonValue
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.ledger import dead_letter
from db.ledger.dead_letter import Choice
from jobs._declaration import Payload
from jobs.insert_rows import InsertRows
from tests.command_line import Cli, make_cli, sentence
from tests.inprocess import BOMB, Bench
from tests.proxy import Road
from tests.sample_jobs.act_out import COUNTS_OF_BAD, ActOut
from tests.sample_jobs.write_notes import WriteNotes
from tests.stage import Stage, connected
from tests.workers import until

NAMES = ["one", "two", "three", "bomb", "five"]
ROWS: list[dict[str, JsonValue]] = [{"name": name} for name in NAMES]
FAIL = ActOut(then="fail")


@pytest.fixture
def cli(database_url: str, redis_url: str) -> Cli:
    return make_cli(database_url, redis_url)


async def run(cli: Cli, *words: str) -> list[dict[str, Any]]:
    """The lines of JSON that a command prints."""
    result = await asyncio.to_thread(cli, *words, "--json")
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


async def failing(bench: Bench, payload: Payload = FAIL) -> UUID:
    """A job that has failed for good."""
    job_id = (await bench.producer.enqueue(payload, attempts=1)).job_id
    await bench.deliver(job_id)
    return job_id


async def state_of(bench: Bench, job_id: UUID) -> tuple[object, ...]:
    row = await bench.job(job_id)
    return row.state, row.reason, row.attempt, row.crashes


@pytest.mark.usefixtures("stage")
async def test_failed_jobs_are_listed_with_their_reasons(bench: Bench, cli: Cli) -> None:
    job_id, other = await failing(bench), await failing(bench, ActOut(then="reject"))
    await bench.run(ActOut())

    found = await run(cli, "failed")
    rejected = await run(cli, "failed", "--reason", "rejected")
    shown = (await asyncio.to_thread(cli, "failed")).stdout

    assert [one["job_id"] for one in found] == [str(other), str(job_id)]
    assert [(one["job_id"], one["error"]) for one in rejected] == [(str(other), "no such club")]
    assert "the dice fell badly" in shown
    assert "1 act_out rejected" in shown


async def test_a_failed_job_is_run_again_as_if_it_were_new(
    bench: Bench, cli: Cli, stage: Stage
) -> None:
    job_id = await failing(bench)
    await stage.value("UPDATE bulwark.job SET payload = '{}', crashes = 3 WHERE id = $1", job_id)

    (told,) = await run(cli, "retry", str(job_id))
    before = await state_of(bench, job_id)
    await bench.deliver(job_id)

    assert told == {"job_id": str(job_id), "state": "queued"}
    assert before == ("queued", "retried", 0, 0)
    assert await state_of(bench, job_id) == ("succeeded", None, 0, 0)
    assert await stage.notes() == ["done"]


async def test_a_retried_import_goes_on_behind_what_it_has_committed(
    bench: Bench, cli: Cli, connection: asyncpg.Connection
) -> None:
    await connection.execute(BOMB)
    payload = InsertRows(table="team", rows=ROWS, chunk_rows=2)
    job_id = await failing(bench, payload)
    assert await bench.counts(job_id) == {"inserted": 2, "not_reached": 3}
    await connection.execute("DROP TRIGGER explode ON team")

    await run(cli, "retry", str(job_id))
    await bench.deliver(job_id)

    report = await bench.report(job_id)
    assert (report.state, report.adds_up) == ("succeeded", True)
    assert report.tally.counts == {"inserted": 5}
    assert [r["name"] for r in await connection.fetch("SELECT name FROM team ORDER BY id")] == NAMES
    assert sum(line["rows"] for line in await bench.audit(job_id)) == 5


async def test_a_job_that_counts_no_rows_repeats_nothing_when_it_is_retried(
    bench: Bench, cli: Cli, stage: Stage
) -> None:
    job_id = await failing(bench, WriteNotes(chunks=3, is_counted=False, fail_at=3))
    assert await stage.ended_as(job_id) == ("failed", "rejected", 1)

    await run(cli, "retry", str(job_id))
    await bench.deliver(job_id)

    assert await stage.ended_as(job_id) == ("failed", "rejected", 1)
    assert await stage.notes() == ["chunk 1", "chunk 2"]


async def test_an_atomic_import_is_judged_anew_when_it_is_retried(
    bench: Bench, cli: Cli, connection: asyncpg.Connection
) -> None:
    await connection.execute("INSERT INTO team (name) VALUES ('three')")
    job_id = await failing(bench, InsertRows(table="team", rows=ROWS, chunk_rows=2, atomic=True))
    assert await bench.counts(job_id) == {"rejected": 1, "not_reached": 4}
    await connection.execute("DELETE FROM team")

    await run(cli, "retry", str(job_id))
    await bench.deliver(job_id)

    report = await bench.report(job_id)
    assert (report.state, report.adds_up) == ("succeeded", True)
    assert report.tally.counts == {"inserted": 5}
    assert await bench.verdicts(job_id) == []


@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "row by row"])
async def test_an_import_whose_file_ends_blank_is_judged_anew_when_it_is_retried(
    bench: Bench, cli: Cli, connection: asyncpg.Connection, tmp_path: Path, atomic: bool
) -> None:
    path = tmp_path / "teams.csv"
    path.write_text("name\nRed\nBlue\n\n")
    await connection.execute("INSERT INTO team (name) VALUES ('Blue')")
    job_id = await bench.run_file(
        path, "spooled", table="team", chunk_rows=1, atomic=atomic, max_rejects=0
    )
    before = await bench.counts(job_id)
    await connection.execute("DELETE FROM team WHERE name = 'Blue'")

    await run(cli, "retry", str(job_id))
    await bench.deliver(job_id)

    report = await bench.report(job_id)
    assert before == {"rejected": 1, "not_reached" if atomic else "inserted": 1}
    assert (report.state, report.adds_up, report.error) == ("succeeded", True, None)
    assert report.tally.counts == {"inserted": 2}
    assert await bench.verdicts(job_id) == []
    names = await connection.fetch("SELECT name FROM team ORDER BY name")
    assert [row["name"] for row in names] == ["Blue", "Red"]
    assert sum(line["rows"] for line in await bench.audit(job_id)) == 2


async def test_an_import_that_gave_up_within_a_chunk_passes_over_no_row_when_it_is_retried(
    bench: Bench, cli: Cli, connection: asyncpg.Connection
) -> None:
    await connection.execute("INSERT INTO team (name) VALUES ('two')")
    job_id = await failing(bench, InsertRows(table="team", rows=ROWS, chunk_rows=4, max_rejects=0))
    before = await bench.counts(job_id)
    await connection.execute("DELETE FROM team WHERE name = 'two'")

    await run(cli, "retry", str(job_id))
    await bench.deliver(job_id)

    report = await bench.report(job_id)
    assert before == {"inserted": 1, "rejected": 1, "not_reached": 3}
    assert (report.state, report.reason, report.tally.counts) == ("failed", "rejected", before)
    assert "the rows behind were not reached" in str(report.error)
    assert report.adds_up


@pytest.mark.usefixtures("stage")
async def test_refused_rows_are_written_anew_by_the_next_run(bench: Bench, cli: Cli) -> None:
    job_id = await failing(bench, ActOut(then="reject_rows"))
    before = await bench.verdicts(job_id)

    await run(cli, "retry", str(job_id))
    await bench.deliver(job_id)

    assert await bench.verdicts(job_id) == before
    assert (await bench.report(job_id)).tally.counts == COUNTS_OF_BAD


@pytest.mark.usefixtures("stage")
async def test_many_are_retried_by_what_they_have_in_common(
    bench: Bench, cli: Cli, stage: Stage
) -> None:
    old, new, rejected = [await failing(bench, one) for one in (FAIL, FAIL, ActOut(then="reject"))]
    await stage.value(
        "UPDATE bulwark.job SET finished_at = now() - interval '3 hours' WHERE id = $1", old
    )

    told = await run(
        cli, "retry", "--kind", "act_out", "--reason", "attempts_exhausted", "--since", "2h"
    )
    again = await run(cli, "retry", "--kind", "act_out", "--since", "2h", "--queue", "other")

    assert ([one["job_id"] for one in told], again) == ([str(new)], [])
    assert [(await bench.job(one)).state for one in (old, new, rejected)] == [
        "failed",
        "queued",
        "failed",
    ]


@pytest.mark.usefixtures("stage")
async def test_two_who_retry_at_the_same_time_queue_a_job_once(
    bench: Bench, sessions: async_sessionmaker[AsyncSession]
) -> None:
    job_id = await failing(bench)

    async def again() -> list[UUID]:
        async with sessions.begin() as session:
            return await dead_letter.retry(session, [job_id])

    assert sorted(map(len, await asyncio.gather(again(), again()))) == [0, 1]
    async with sessions() as session:
        assert await dead_letter.choose_failed(session, Choice()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Say which"),
        (("--since", "yesterday"), "--since 'yesterday'"),
        (("--since", "2026-01-01T00:00:00"), "with its zone"),
        (("0123456789", "--kind", "x"), "Say which"),
        *(
            (("--since", since), f"--since '{since}' is outside the years 1 to 9999.")
            for since in ("999999d", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00")
        ),
    ],
)
async def test_a_retry_that_is_not_clear_is_refused_in_one_sentence(
    cli: Cli, words: tuple[str, ...], said: str
) -> None:
    result = await asyncio.to_thread(cli, "retry", *words)

    assert result.exit_code == 2
    assert said in sentence(result)


@pytest.mark.parametrize("since", ["999999d", "0001-01-01T00:00:00+14:00"])
async def test_a_time_that_no_calendar_has_is_refused_in_one_sentence(cli: Cli, since: str) -> None:
    result = await asyncio.to_thread(cli, "failed", "--since", since)

    assert result.exit_code == 2
    assert sentence(result) == f"--since '{since}' is outside the years 1 to 9999."


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
async def test_an_outage_in_the_second_batch_is_told_with_what_is_queued_and_the_rest_goes_on(
    database_url: str, redis_url: str, stage: Stage, options: tuple[str, ...]
) -> None:
    await stage.execute(
        "INSERT INTO bulwark.job (id, kind, payload, max_attempts, timeout_s, state, reason,"
        " finished_at) SELECT lpad(to_hex(n), 32, '0')::uuid, 'act_out', '{}', 1, 9, 'failed',"
        " 'rejected', now() FROM generate_series(1, 501) AS n"
    )
    road = Road(database_url)
    await road.open()
    cli = make_cli(road.url, redis_url)
    words = ("retry", "--kind", "act_out", *options)
    async with connected(database_url) as other, other.transaction():
        await other.execute("SELECT FROM bulwark.job ORDER BY id DESC LIMIT 1 FOR UPDATE")
        retrying = asyncio.create_task(asyncio.to_thread(cli, *words))
        await until(partial(waits_for, stage, other), "the second batch waits for its job")
        await road.close()
        cut = await retrying
    await road.open()
    rest = await asyncio.to_thread(cli, *words)
    await road.close()

    assert (cut.exit_code, rest.exit_code) == (3, 0), rest.stderr
    assert cut.stderr.startswith(
        "bulwark: 500 of 501 failed jobs are queued again, and the same command goes on with the "
        "others: PostgreSQL "
    )
    assert len(cut.stderr.splitlines()) == 1
    lines = [[json.loads(one) for one in run.stdout.splitlines() if options] for run in (cut, rest)]
    assert [len({one["job_id"] for one in run}) for run in lines] == (
        [500, 1] if options else [0, 0]
    )
    assert options or (cut.stdout, rest.stdout.count("is queued again.")) == ("", 1)
    states = "SELECT state, count(*) FROM bulwark.job GROUP BY state"
    assert await stage.rows(states) == [("queued", 501)]


async def waits_for(stage: Stage, other: asyncpg.Connection) -> bool:
    blocked = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE $1 = ANY (pg_blocking_pids(pid)))"
    return bool(await stage.value(blocked, other.get_server_pid()))


@pytest.mark.usefixtures("stage")
async def test_a_job_that_has_not_failed_is_not_retried(bench: Bench, cli: Cli) -> None:
    job_id = await bench.run(ActOut())

    result = await asyncio.to_thread(cli, "retry", str(job_id))

    assert result.exit_code == 2
    assert "has the state succeeded" in sentence(result)
