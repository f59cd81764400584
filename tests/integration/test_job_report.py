"""What a job's report says of its rows is true: that all are accounted for, or how many are not."""

import io
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest
from pydantic import JsonValue
from rich.console import Console

from jobs.insert_rows import InsertRows
from tests.inprocess import BOMB, Bench
from tests.sample_jobs.act_out import COUNTS_OF_BAD, COUNTS_OF_GOOD, NOTES, ActOut, Deed
from tests.stage import Stage
from worker.display import show_job
from worker.reports import JobReport, list_jobs, read_job

TEAMS = b"name\none\ntwo\nbomb\nfour\n"
ACCOUNTED = "every row is accounted for"
UNREAD = "was not reached and has no verdicts: "


@pytest.fixture
def bench(bench: Bench, tmp_path: Path) -> Bench:
    bench.import_folders.append(tmp_path)
    return bench


@pytest.fixture
def teams(tmp_path: Path) -> Path:
    return written(tmp_path / "teams.csv", TEAMS)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


async def report_on(bench: Bench, job_id: UUID) -> tuple[JobReport, str]:
    """The report, and how it is shown."""
    async with bench.sessions() as session:
        report = await read_job(session, job_id, 15.0)
    out = io.StringIO()
    show_job(Console(file=out, width=60), report)
    return report, out.getvalue()


async def test_a_job_that_could_not_close_says_how_much_it_did_not_reach(
    bench: Bench, connection: asyncpg.Connection, teams: Path
) -> None:
    await connection.execute(BOMB)
    job_id = await bench.run_file(teams, "in place", table="team", chunk_rows=2)
    written(teams, b"name\nanother file\n")
    await connection.execute("UPDATE bulwark.job SET run_at = now()")
    await bench.deliver(job_id)
    report, shown = await report_on(bench, job_id)

    assert (report.state, report.tally.counts) == ("failed", {"inserted": 2})
    assert (report.reached_end, report.adds_up) == (False, False)
    assert report.as_json()["reached_end"] is False
    assert ACCOUNTED not in shown
    left = len(b"bomb\nfour\n")
    assert f"2 rows were read; the rest of the input ({left} bytes) {UNREAD}" in shown


@pytest.mark.parametrize("max_rejects", [0, 1])
@pytest.mark.parametrize("tail", [b"", b"\n\r\n\n"])
async def test_a_failed_job_whose_rows_all_have_verdicts_is_accounted_for(
    bench: Bench, teams: Path, max_rejects: int, tail: bytes
) -> None:
    written(teams, b"name\none\none\none\nfour\n" + tail)
    job_id = await bench.run_file(
        teams, "spooled", table="team", chunk_rows=1, max_rejects=max_rejects
    )
    report, shown = await report_on(bench, job_id)

    assert report.state == "failed"
    assert sum(report.tally.counts.values()) == 4
    assert (report.reached_end, report.adds_up) == (True, True)
    assert f"= 4: {ACCOUNTED}" in shown
    assert UNREAD not in shown


@pytest.mark.parametrize("data", [b"name\n", b"name\n\n\n", b"name\none\n\n", b"name\none"])
async def test_a_file_is_read_to_its_end_whatever_stands_there(
    bench: Bench, teams: Path, data: bytes
) -> None:
    written(teams, data)
    report, shown = await report_on(bench, await bench.run_file(teams, "spooled", table="team"))

    assert (report.state, report.reached_end, report.adds_up) == ("succeeded", True, True)
    assert ACCOUNTED in shown


async def test_rows_of_a_payload_are_read_to_their_end(bench: Bench) -> None:
    both: list[dict[str, JsonValue]] = [{"name": "one"}, {"name": "two"}]
    for rows in ([], both):
        report, _ = await report_on(bench, await bench.run(InsertRows(table="team", rows=rows)))
        assert (report.tally.rows, report.reached_end, report.adds_up) == (len(rows), True, True)


async def test_a_job_that_failed_before_its_first_row_has_not_reached_its_input(
    bench: Bench, teams: Path
) -> None:
    spooled = await bench.run_file(teams, "spooled", table="nowhere")
    inline = await bench.run(InsertRows(table="nowhere", rows=[{"name": "one"}]))

    report, shown = await report_on(bench, spooled)
    assert (report.state, report.reached_end, report.adds_up) == ("failed", False, False)
    assert f"0 rows were read; the rest of the input ({len(TEAMS)} bytes) {UNREAD}" in shown
    report, shown = await report_on(bench, inline)
    assert (report.state, report.reached_end, report.adds_up) == ("failed", False, False)
    assert f"0 rows were read; the rest of the input {UNREAD}" in shown


async def test_a_job_that_goes_on_claims_nothing_about_the_rest(
    bench: Bench, connection: asyncpg.Connection, teams: Path
) -> None:
    await connection.execute(BOMB)
    job_id = await bench.run_file(teams, "spooled", table="team", chunk_rows=2)
    report, shown = await report_on(bench, job_id)

    assert (report.state, report.reached_end, report.adds_up) == ("queued", False, False)
    assert "2 = 2: the rows read are accounted for" in shown
    assert UNREAD not in shown


async def test_a_failed_job_without_an_input_has_left_nothing_unread(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await connection.execute(NOTES)
    job_id = await bench.run(ActOut(then="reject"))
    report, shown = await report_on(bench, job_id)

    assert (report.state, report.reached_end) == ("failed", True)
    assert UNREAD not in shown


async def test_a_job_of_one_transaction_reports_the_verdicts_of_its_outcome(
    stage: Stage, bench: Bench
) -> None:
    deeds: dict[Deed, dict[str, int]]
    deeds = {"count_rows": COUNTS_OF_GOOD, "reject_rows": COUNTS_OF_BAD}
    for deed, counts in deeds.items():
        report, shown = await report_on(bench, await bench.run(ActOut(then=deed)))
        assert report.tally.counts == counts
        assert report.as_json()["rows_read"] == 3
        assert report.adds_up
        assert f"= 3: {ACCOUNTED}" in shown
    async with bench.sessions() as session:
        listed = await list_jobs(session, state=None, queue=None, most=10)
    assert [(one["rows_read"], one["rejected"]) for one in listed] == [(3, 2), (3, 1)]


async def test_an_outcome_that_only_looks_like_verdicts_breaks_no_report(
    stage: Stage, bench: Bench
) -> None:
    job_id = await bench.run(ActOut())
    for outcome in ('{"verdicts": [1]}', '{"verdicts": {"moved": "two"}}', '{"verdicts": null}'):
        await stage.value("UPDATE bulwark.job SET outcome = $1 WHERE id = $2", outcome, job_id)
        report, _ = await report_on(bench, job_id)
        assert (report.tally.rows, report.adds_up) == (0, True)
        async with bench.sessions() as session:
            (listed,) = await list_jobs(session, state=None, queue=None, most=10)
        assert (listed["rows_read"], listed["rejected"]) == (0, 0)
