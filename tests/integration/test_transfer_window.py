"""A window of transfers: a verdict for each, in order and whatever the chunks, or all together."""

from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jobs._input import InPlace
from jobs.transfer_window import TransferWindow
from tests.inprocess import Bench
from tests.league import (
    ANN,
    BLUE,
    BOB,
    CID,
    DEE,
    FAY,
    FULL,
    GOLD,
    GREEN,
    LOST,
    NO_TEAM,
    NOBODY,
    RED,
    changes,
    found_league,
    homes,
    tables,
    transfers,
)
from worker.reports import read_job

Row = dict[str, Any]


@pytest.fixture(autouse=True)
async def league(connection: asyncpg.Connection) -> None:
    await found_league(connection)


def line(hero_id: int | None, start: int | None, end: int | None, **more: Any) -> Row:
    return {"hero_id": hero_id, "from_team_id": start, "to_team_id": end, **more}


LINES = [
    line(ANN, RED, GREEN, reason="loan"),
    line(ANN, RED, BLUE),
    line(FAY, None, RED, transferred_at="2020-07-01T00:00:00Z"),
    line(DEE, BLUE, RED),
    line(LOST, RED, BLUE),
    line(ANN, GREEN, BLUE),
    line(NOBODY, RED, BLUE),
    line(BOB, RED, None),
    line(None, RED, BLUE),
    line(DEE, BLUE, FULL),
]
MOVED = [
    (ANN, RED, GREEN),
    (FAY, None, RED),
    (DEE, BLUE, RED),
    (ANN, GREEN, BLUE),
    (BOB, RED, None),
]
REFUSED = [
    (2, "rejected", "not_in_from_team"),
    (5, "rejected", "deleted_hero"),
    (7, "rejected", "unknown_hero"),
    (9, "rejected", "invalid"),
    (10, "rejected", "not_in_from_team"),
]


async def window(bench: Bench, rows: list[Row], **asked: Any) -> UUID:
    return await bench.run(TransferWindow(rows=rows, **asked))


async def refusals(bench: Bench, job_id: UUID) -> list[tuple[int, str, str]]:
    return [(one.row_no, one.verdict, one.code) for one in await bench.verdicts(job_id)]


@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
async def test_every_transfer_has_its_verdict_and_takes_effect_in_order(
    chunk_rows: int, bench: Bench, connection: asyncpg.Connection
) -> None:
    job_id = await window(bench, LINES, chunk_rows=chunk_rows)

    row: Any = await bench.job(job_id)
    assert (row.state, row.error) == ("succeeded", None)
    assert row.outcome == {
        "rows": 10,
        "filtered": 0,
        "verdicts": {"moved": 5, "rejected": 5},
        "along": {"hero": 5, "membership": 3},
    }
    assert await transfers(connection) == MOVED
    assert await refusals(bench, job_id) == REFUSED
    given = await connection.fetch("SELECT reason, transferred_at::date::text FROM transfer")
    assert given[0]["reason"] == "loan"
    assert given[1]["transferred_at"] == "2020-07-01"
    async with bench.sessions() as session:
        assert (await read_job(session, job_id, 15.0)).adds_up


async def test_the_audit_of_a_window_names_chunk_and_version(bench: Bench) -> None:
    rows = [line(CID, RED, BLUE), line(CID, BLUE, GOLD), line(CID, GOLD, None)]
    audit = await bench.audit(await window(bench, rows, chunk_rows=2))

    assert [(one["chunk_no"], one["entry_no"]) for one in audit] == [
        (1, 0),
        (1, 1),
        (1, 2),
        (2, 0),
        (2, 1),
    ]
    assert changes(audit) == [
        ("insert", "transfer", [[1], [2]], None, None),
        ("move", "hero", [[CID]], {"team_id": RED}, 1),
        ("move", "hero", [[CID]], {"team_id": BLUE}, 2),
        ("insert", "transfer", [[3]], None, None),
        ("move", "hero", [[CID]], {"team_id": GOLD}, 3),
    ]


async def test_a_file_names_heroes_and_teams_by_their_natural_keys(
    bench: Bench, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    await connection.execute("UPDATE hero SET external_id = 'x' || id")
    path = tmp_path / "window.csv"
    path.write_text(
        "player,left,joined\nx1,Red,Blue\nx6,,Green\nx9,Red,Blue\nx2,Red,Pink\nx2,Red,\n"
    )
    bench.import_folders = [tmp_path]
    names = {"player": "hero.external_id", "left": "from_team_id.name", "joined": "to_team_id.name"}
    source = InPlace(type="in_place", path=str(path))
    job_id = await bench.run(TransferWindow(source=source, map=names))

    assert await transfers(connection) == [(ANN, RED, BLUE), (FAY, None, GREEN), (BOB, RED, None)]
    missing = [(one.line, one.code, one.column) for one in await bench.verdicts(job_id)]
    assert missing == [(4, "missing_reference", "player"), (5, "missing_reference", "joined")]
    raws = [one.raw for one in await bench.verdicts(job_id)]
    assert raws == [b"x9,Red,Blue\n", b"x2,Red,Pink\n"]


async def test_heroes_come_from_wherever_they_are_if_the_window_does_not_say(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    rows = [{"hero_id": hero_id, "to_team_id": GOLD} for hero_id in (ANN, FAY, DEE, ANN)]
    job_id = await window(bench, rows, from_anywhere=True)

    assert await transfers(connection) == [(ANN, RED, GOLD), (FAY, None, GOLD), (DEE, BLUE, GOLD)]
    assert await refusals(bench, job_id) == [(4, "rejected", "same_team")]


async def test_a_version_that_is_another_by_then_is_a_conflict(bench: Bench) -> None:
    rows = [line(ANN, RED, BLUE, seen=1), line(ANN, BLUE, GOLD, seen=1), line(BOB, RED, GOLD)]
    job_id = await window(bench, rows, expect_version="seen", chunk_rows=1)

    assert await refusals(bench, job_id) == [(2, "conflict", "version_conflict")]
    assert await bench.counts(job_id) == {"moved": 2, "conflict": 1}


# All together, or only tried


async def test_together_all_transfers_take_effect_or_none(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    before = await tables(connection)
    job_id = await window(bench, LINES, atomic=True)

    row: Any = await bench.job(job_id)
    assert (row.state, row.reason) == ("failed", "rejected")
    assert await tables(connection) == before
    assert await bench.audit(job_id) == []
    counts = await bench.counts(job_id)
    assert counts["not_reached"] + counts["rejected"] == len(LINES)

    good = [
        one for number, one in enumerate(LINES, 1) if number not in [row for row, *_ in REFUSED]
    ]
    await window(bench, good, atomic=True, chunk_rows=2)
    assert await transfers(connection) == MOVED


async def test_a_dry_run_tells_every_verdict_and_changes_nothing(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    before = await tables(connection)
    job_id = await window(bench, LINES, dry_run=True, chunk_rows=3)

    assert await tables(connection) == before
    assert await bench.audit(job_id) == []
    assert await bench.counts(job_id) == {"moved": 5, "rejected": 5}
    assert await refusals(bench, job_id) == REFUSED


async def test_a_window_ends_at_one_reject_too_many_and_counts_the_rest(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    job_id = await window(bench, LINES, max_rejects=1, chunk_rows=4)

    assert await transfers(connection) == MOVED[:3]
    assert await bench.counts(job_id) == {"moved": 3, "rejected": 2, "not_reached": 5}


async def test_a_window_of_more_rows_than_it_may_have_changes_nothing(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    job_id = await window(bench, LINES, max_rows=9)
    assert "10 rows and at most 9" in str((await bench.job(job_id)).error)
    assert await transfers(connection) == []


# Going on


async def test_a_window_goes_on_behind_the_chunk_at_which_it_was_interrupted(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await connection.execute(
        "CREATE FUNCTION explode() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE EXCEPTION 'the disk is gone' USING ERRCODE = '58000'; END $$;"
        f"CREATE TRIGGER explode BEFORE INSERT ON transfer FOR EACH ROW WHEN (NEW.hero_id = {BOB}) "
        "EXECUTE FUNCTION explode()"
    )
    job_id = await window(bench, LINES, chunk_rows=3)
    assert (await bench.job(job_id)).state == "queued"
    assert await transfers(connection) == MOVED[:4]

    await connection.execute("DROP TRIGGER explode ON transfer")
    await connection.execute("UPDATE bulwark.job SET run_at = now()")
    await bench.deliver(job_id)
    assert (await bench.job(job_id)).state == "succeeded"
    assert await transfers(connection) == MOVED
    assert await bench.counts(job_id) == {"moved": 5, "rejected": 5}
    assert await refusals(bench, job_id) == REFUSED


# What cannot be a window

NO_WINDOWS = {
    "does not say which team a hero joins": ({"hero_id": 1, "from_team_id": 1}, {}),
    "does not say which team a hero leaves": ({"hero_id": 1, "to_team_id": 1}, {}),
    "and yet the input gives from_team_id": (line(1, 1, 2), {"from_anywhere": True}),
    "transfer.hero_id must be given": ({"from_team_id": 1, "to_team_id": 2}, {}),
    "column 'fee' has no field in transfer": (line(1, 1, 2, fee=3), {}),
}


@pytest.mark.parametrize("sentence", NO_WINDOWS)
async def test_an_input_that_is_no_window_is_refused_as_a_whole(
    sentence: str, bench: Bench, connection: asyncpg.Connection
) -> None:
    row, asked = NO_WINDOWS[sentence]
    job: Any = await bench.job(await window(bench, [row], **asked))
    assert (job.state, job.reason) == ("failed", "rejected")
    assert sentence in job.error
    assert await transfers(connection) == []


async def test_a_window_without_transfers_succeeds(bench: Bench) -> None:
    job: Any = await bench.job(await window(bench, []))
    assert (job.state, job.outcome["verdicts"]) == ("succeeded", {})


# Whatever the chunks

TEAMS = [GOLD, GREEN, BLUE, FULL, RED]
lines = st.builds(
    line,
    st.sampled_from([ANN, BOB, CID, DEE, FAY, LOST]),
    st.sampled_from([*TEAMS, None, None]),
    st.sampled_from([*TEAMS, *TEAMS, None, NO_TEAM]),
)


@settings(
    max_examples=12,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # an example is two jobs
)
@given(rows=st.lists(lines, min_size=10, max_size=30), chunk_rows=st.integers(1, 12))
async def test_a_window_in_chunks_ends_as_one_by_one(
    connection: asyncpg.Connection, bench: Bench, rows: list[Row], chunk_rows: int
) -> None:
    ends = []
    for size in (1, chunk_rows):
        await found_league(connection)
        job_id = await window(bench, rows, chunk_rows=size)
        moved = [one for one in changes(await bench.audit(job_id)) if one[0] != "insert"]
        ends.append(
            (
                await homes(connection),
                await transfers(connection),
                await bench.counts(job_id),
                await refusals(bench, job_id),
                moved,
            )
        )
    assert ends[0] == ends[1]
