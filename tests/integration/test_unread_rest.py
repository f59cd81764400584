"""Where nobody could count the rows that were not reached, `bulwark job` says so."""

import asyncio
import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from jobs._declaration import Payload
from jobs.insert_rows import InsertRows
from jobs.soft_delete_rows import SoftDeleteRows
from tests.command_line import Cli, make_cli
from tests.inprocess import Bench
from tests.sample_jobs.act_out import GATE, ActOut
from tests.stage import Stage
from tests.workers import Start, environment, until

QUICK = {"beat_interval_s": "0.3", "lost_after_s": "1.0", "relay_interval_s": "0.1"}
NAMES = ["one", "one", "three", "four", "five"]
ROWS: list[dict[str, Any]] = [{"name": name} for name in NAMES]
FILE = "name\n" + "".join(f"{name}\n" for name in NAMES)
REST = "three\nfour\nfive\n"
"""Behind the first chunk of two rows, of which the second is refused."""
OF_FIRST_CHUNK = {"inserted": 1, "rejected": 1}
GATED_ROW = f"""
    CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql
        AS $$ BEGIN PERFORM pg_advisory_xact_lock_shared({GATE}); RETURN NEW; END $$;
    CREATE TRIGGER gate BEFORE INSERT ON team FOR EACH ROW
        WHEN (NEW.name = 'three') EXECUTE FUNCTION wait_at_gate()
"""
"""The second chunk of two rows waits."""
GATED_CLOSING = f"""
    CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql
        AS $$ BEGIN PERFORM pg_advisory_xact_lock_shared({GATE}); RETURN NEW; END $$;
    CREATE TRIGGER gate BEFORE INSERT ON bulwark.chunk FOR EACH ROW
        WHEN (NEW.rows > 2) EXECUTE FUNCTION wait_at_gate()
"""
"""What closes is larger than the chunks of two rows before it."""
ACCOUNTED = "every row is accounted for"
UNREAD = "was not reached and has no verdicts"


@pytest.fixture
def cli(database_url: str, redis_url: str) -> Cli:
    return make_cli(database_url, redis_url)


@pytest.fixture
def bench(bench: Bench, tmp_path: Path) -> Bench:
    bench.import_folders.append(tmp_path)
    return bench


async def told(cli: Cli, job_id: UUID) -> tuple[dict[str, Any], str]:
    """What `bulwark job` says, as a document and to people."""
    as_json = await asyncio.to_thread(cli, "job", str(job_id), "--json")
    shown = await asyncio.to_thread(cli, "job", str(job_id))
    return json.loads(as_json.stdout), shown.stdout


async def is_open_behind_the_first_chunk(cli: Cli, job_id: UUID) -> None:
    """It is told that the verdicts of the first chunk are all there are; they are kept."""
    document, shown = await told(cli, job_id)
    assert (document["reached_end"], document["adds_up"]) == (False, False)
    assert (document["verdicts"], document["rows_read"]) == (OF_FIRST_CHUNK, 2)
    assert ACCOUNTED not in shown
    assert "1 + 1 = 2: the rows read are accounted for" in shown
    left = f"the rest of the input ({unread_bytes(document)} bytes)"
    assert f"2 rows were read; {left} {UNREAD}" in shown
    assert f"`bulwark retry {job_id}` goes on with it" in shown
    rejects = await asyncio.to_thread(cli, "rejects", str(job_id), "--json")
    assert [json.loads(line)["row"] for line in rejects.stdout.splitlines()] == [2]


def unread_bytes(document: dict[str, Any]) -> int:
    """Bytes of the input that no receipt covers."""
    left: int = document["input_bytes"] - document["done_bytes"]
    assert left > 0
    return left


async def test_of_a_poisoned_job_the_rest_is_open(
    bench: Bench, stage: Stage, cli: Cli, start: Start, database_url: str, redis_url: str
) -> None:
    await stage.execute(GATED_ROW)
    await stage.close_gate()
    payload = InsertRows(table="team", rows=ROWS, chunk_rows=2)
    job_id = (await bench.producer.enqueue(payload)).job_id
    claim = None
    for _ in range(4):  # the first crash has a committed chunk before it, and does not count
        worker = start(environment(database_url, redis_url, **QUICK))

        async def runs_again(before: object = claim) -> object:
            row = await stage.row(job_id)
            return row["state"] == "running" and row["claim_id"] != before and row["claim_id"]

        claim = await until(runs_again, "another worker runs the job")
        await stage.somebody_at_gate()
        worker.kill()
    start(environment(database_url, redis_url, **QUICK))
    await stage.becomes(job_id, "failed")

    document, shown = await told(cli, job_id)
    assert (document["state"], document["reason"]) == ("failed", "poisoned")
    assert "failed (poisoned)" in shown
    await is_open_behind_the_first_chunk(cli, job_id)
    assert await stage.value("SELECT count(*) FROM team") == 1


async def test_of_a_cancelled_job_whose_input_cannot_be_read_any_more_the_rest_is_open(
    bench: Bench, stage: Stage, cli: Cli, tmp_path: Path
) -> None:
    file = tmp_path / "teams.csv"
    file.write_text(FILE)
    await stage.execute(GATED_ROW)
    await stage.close_gate()
    job_id = await bench.enqueue_file(file, "in place", table="team", chunk_rows=2)
    executor = await bench.register()
    with capture_logs() as logs:
        delivery = asyncio.create_task(executor.deliver(job_id))
        await stage.somebody_at_gate()
        file.unlink()
        executor.running.stop(executor.running.claims[0])
        await delivery

    assert await stage.ended_as(job_id) == ("cancelled", None, 0)
    (unclosed,) = [one for one in logs if one["event"] == "job.not_closed"]
    assert str(file) in unclosed["reason"]
    await is_open_behind_the_first_chunk(cli, job_id)
    document, shown = await told(cli, job_id)
    assert unread_bytes(document) == len(REST)
    assert f"bulwark retry {job_id}" in shown


async def test_of_a_failed_job_that_is_not_closed_in_time_the_rest_is_open(
    bench: Bench, stage: Stage, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.execution.CLOSING_TIMEOUT_S", 0.5)
    await stage.execute(GATED_CLOSING)
    await stage.close_gate()
    payload = InsertRows(table="team", rows=ROWS, chunk_rows=2, max_rejects=0)
    with capture_logs() as logs:
        job_id = await bench.run(payload)

    assert await stage.ended_as(job_id) == ("failed", "rejected", 1)
    (unclosed,) = [one for one in logs if one["event"] == "job.not_closed"]
    assert unclosed["reason"].startswith("TimeoutError")
    await is_open_behind_the_first_chunk(cli, job_id)


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(InsertRows(table="team", rows=ROWS), id="rows"),
        pytest.param(SoftDeleteRows(table="team", keys=[1, 2]), id="keys"),
        pytest.param(SoftDeleteRows(table="team", filter={"name": "one"}), id="a filter"),
    ],
)
async def test_of_a_job_that_was_cancelled_while_it_waited_all_is_open(
    payload: Payload, bench: Bench, cli: Cli
) -> None:
    job_id = (await bench.producer.enqueue(payload)).job_id
    await asyncio.to_thread(cli, "cancel", str(job_id))

    document, shown = await told(cli, job_id)
    assert (document["state"], document["started_at"]) == ("cancelled", None)
    assert (document["reached_end"], document["adds_up"]) == (False, False)
    assert (document["verdicts"], document["rows_read"]) == ({}, 0)
    assert ACCOUNTED not in shown
    assert f"0 rows were read; the rest of the input {UNREAD}" in shown
    assert f"bulwark retry {job_id}" in shown


async def test_of_a_file_whose_import_was_cancelled_while_it_waited_all_is_open(
    bench: Bench, cli: Cli, tmp_path: Path
) -> None:
    file = tmp_path / "teams.csv"
    file.write_text(FILE)
    job_id = await bench.enqueue_file(file, "spooled", table="team")
    await asyncio.to_thread(cli, "cancel", str(job_id))

    document, shown = await told(cli, job_id)
    assert (document["reached_end"], document["adds_up"]) == (False, False)
    assert unread_bytes(document) == len(FILE)
    assert f"0 rows were read; the rest of the input ({len(FILE)} bytes) {UNREAD}" in shown

    await asyncio.to_thread(cli, "retry", str(job_id))
    await bench.deliver(job_id)
    document, shown = await told(cli, job_id)
    assert document["verdicts"] == {"inserted": 4, "rejected": 1}
    assert (document["reached_end"], document["adds_up"]) == (True, True)
    assert ACCOUNTED in shown


@pytest.mark.usefixtures("stage")
async def test_a_job_without_an_input_that_was_cancelled_while_it_waited_leaves_nothing_open(
    bench: Bench, cli: Cli
) -> None:
    job_id = (await bench.producer.enqueue(ActOut())).job_id
    await asyncio.to_thread(cli, "cancel", str(job_id))

    document, shown = await told(cli, job_id)
    assert (document["reached_end"], document["adds_up"]) == (True, True)
    assert UNREAD not in shown
