"""on_conflict update, deleted rows, and rows of other tables that are missing."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from jobs.insert_rows import InsertRows
from tests.inprocess import Bench
from tests.stage import connected, waiting_for_a_lock
from tests.workers import until

Rows = list[dict[str, Any]]


async def run(bench: Bench, rows: Rows, **options: Any) -> tuple[Mapping[str, int], Any]:
    job_id = await bench.run(InsertRows(table="hero", rows=rows, **options))
    done = await bench.job(job_id)
    assert done.state == "succeeded", done.error
    return await bench.counts(job_id), job_id


async def heroes(bench: Bench, *columns: str) -> Sequence[tuple[Any, ...]]:
    async with bench.sessions() as session:
        names = ", ".join(columns)
        found = await session.execute(sa.text(f"SELECT {names} FROM hero ORDER BY id"))
        return [tuple(row) for row in found]


async def execute(bench: Bench, sql: str) -> None:
    async with bench.sessions() as session:
        await session.execute(sa.text(sql))
        await session.commit()


async def test_a_row_that_is_there_is_updated_and_another_inserted(bench: Bench) -> None:
    await run(bench, [{"external_id": "a", "name": "Ann", "age": 30}])
    counts, _ = await run(
        bench,
        [
            {"external_id": "a", "name": "Anna", "age": 30},
            {"external_id": "b", "name": "Bob", "age": 40},
        ],
        on_conflict="update",
    )
    assert counts == {"updated": 1, "inserted": 1}
    assert await heroes(bench, "external_id", "name", "age", "version") == [
        ("a", "Anna", 30, 2),
        ("b", "Bob", 40, 1),
    ]


async def test_a_row_that_says_nothing_new_is_not_written(bench: Bench) -> None:
    rows = [{"external_id": "a", "name": "Ann", "age": 30}]
    await run(bench, rows)
    [before] = await heroes(bench, "xmin", "ctid", "updated_at", "version")
    counts, job_id = await run(bench, rows, on_conflict="update")
    assert counts == {"unchanged": 1}
    assert await heroes(bench, "xmin", "ctid", "updated_at", "version") == [before]
    assert await bench.audit(job_id) == []


async def test_what_a_row_does_not_give_stays_and_what_it_gives_as_null_becomes_null(
    bench: Bench,
) -> None:
    await run(
        bench,
        [
            {"external_id": "a", "name": "Ann", "age": 30, "email": "a@x.org"},
            {"external_id": "b", "name": "Bob", "age": 40, "email": "b@x.org"},
        ],
    )
    counts, _ = await run(
        bench,
        [
            {"external_id": "a", "name": "Anna"},
            {"external_id": "b", "name": "Bob", "age": None},
        ],
        on_conflict="update",
    )
    assert counts == {"updated": 2}
    assert await heroes(bench, "name", "age", "email") == [
        ("Anna", 30, "a@x.org"),
        ("Bob", None, "b@x.org"),
    ]


async def test_only_the_named_columns_are_updated(bench: Bench) -> None:
    await run(bench, [{"external_id": "a", "name": "Ann", "age": 30}])
    counts, _ = await run(
        bench,
        [{"external_id": "a", "name": "Anna", "age": 31}],
        on_conflict="update",
        update=["age"],
    )
    assert counts == {"updated": 1}
    assert await heroes(bench, "name", "age") == [("Ann", 31)]


async def test_a_row_that_meets_two_rows_is_a_conflict(bench: Bench) -> None:
    await run(
        bench,
        [
            {"external_id": "a", "name": "Ann", "email": "a@x.org"},
            {"external_id": "b", "name": "Bob", "email": "b@x.org"},
        ],
    )
    counts, job_id = await run(
        bench,
        [{"external_id": "a", "name": "Who", "email": "b@x.org"}],
        on_conflict="update",
    )
    assert counts == {"conflict": 1}
    [row] = await bench.verdicts(job_id)
    assert (row.verdict, row.code) == ("conflict", "ambiguous_match")
    assert await heroes(bench, "name") == [("Ann",), ("Bob",)]


async def test_the_same_key_twice_ends_as_if_applied_one_by_one(bench: Bench) -> None:
    counts, job_id = await run(
        bench,
        [
            {"external_id": "a", "name": "First", "email": "x@x.org"},
            {"external_id": "a", "name": "Second", "email": "y@x.org"},
            {"external_id": "b", "name": "Third", "email": "x@x.org"},
            {"external_id": "a", "name": "Second", "email": "y@x.org"},
        ],
        on_conflict="update",
    )
    assert counts == {"inserted": 2, "updated": 1, "unchanged": 1}
    assert await heroes(bench, "external_id", "name", "email") == [
        ("a", "Second", "y@x.org"),
        ("b", "Third", "x@x.org"),
    ]
    lines = [(line["action"], line["before"]) for line in await bench.audit(job_id)]
    assert lines == [("insert", None), ("update", {"name": "First", "email": "x@x.org"})]


async def test_a_row_takes_effect_only_on_the_version_that_it_expects(bench: Bench) -> None:
    await run(bench, [{"external_id": x, "name": "Ann"} for x in "ab"])
    counts, job_id = await run(
        bench,
        [
            {"external_id": "a", "name": "Anna", "seen": 1},
            {"external_id": "b", "name": "Bert", "seen": 7},
            {"external_id": "c", "name": "Cleo", "seen": 1},
            {"external_id": "d", "name": "Dora", "seen": None},
            {"external_id": "e", "name": "Emil", "seen": "new"},
        ],
        on_conflict="update",
        expect_version="seen",
    )
    assert counts == {"updated": 1, "conflict": 2, "inserted": 1, "rejected": 1}
    assert await heroes(bench, "external_id", "name") == [
        ("a", "Anna"),
        ("b", "Ann"),
        ("d", "Dora"),
    ]
    codes = [(row.row_no, row.code) for row in await bench.verdicts(job_id)]
    assert codes == [(2, "version_conflict"), (3, "version_conflict"), (5, "invalid")]


@pytest.mark.parametrize("on_conflict", ["reject", "skip", "update"])
async def test_a_deleted_row_is_left_and_another_inserted(bench: Bench, on_conflict: str) -> None:
    await run(bench, [{"external_id": "a", "name": "Ann"}])
    await execute(bench, "UPDATE hero SET deleted_at = now()")
    counts, _ = await run(bench, [{"external_id": "a", "name": "Anna"}], on_conflict=on_conflict)
    assert counts == {"inserted": 1}
    assert await heroes(bench, "name", "deleted_at IS NULL") == [("Ann", False), ("Anna", True)]


@pytest.mark.parametrize("on_conflict", ["reject", "skip", "update"])
async def test_the_row_deleted_last_is_revived(bench: Bench, on_conflict: str) -> None:
    for day in (1, 3, 2):
        await run(bench, [{"external_id": "a", "name": f"Day {day}", "age": 20 + day}])
        await execute(
            bench, f"UPDATE hero SET deleted_at = '2030-01-0{day}' WHERE deleted_at IS NULL"
        )
    counts, job_id = await run(
        bench,
        [{"external_id": "a", "name": "Anna"}],
        on_conflict=on_conflict,
        on_deleted="revive",
    )
    assert counts == {"revived": 1}
    assert await heroes(bench, "name", "age", "deleted_at IS NULL") == [
        ("Day 1", 21, False),
        ("Anna", 23, True),
        ("Day 2", 22, False),
    ]
    [line] = await bench.audit(job_id)
    assert line["action"] == "revive"
    assert line["before"]["name"] == "Day 3"
    assert line["before"]["deleted_at"].startswith("2030-01-03")


async def test_a_row_that_meets_a_deleted_one_is_rejected_on_request(bench: Bench) -> None:
    await run(bench, [{"external_id": "a", "name": "Ann"}])
    await execute(bench, "UPDATE hero SET deleted_at = now()")
    counts, job_id = await run(
        bench,
        [{"external_id": "a", "name": "Anna"}, {"external_id": "b", "name": "Bob"}],
        on_deleted="reject",
    )
    assert counts == {"rejected": 1, "inserted": 1}
    assert [row.code for row in await bench.verdicts(job_id)] == ["deleted_match"]


async def test_missing_teams_are_created_and_those_of_refused_rows_are_not(bench: Bench) -> None:
    rows: Rows = [
        {"external_id": "a", "name": "Ann", "club": "Ajax"},
        {"external_id": "b", "name": "Bob", "club": "Ajax"},
        {"external_id": "c", "name": "", "club": "Blank FC"},
        {"external_id": "a", "name": "Twin", "club": "Twin FC"},
        {"external_id": "d", "name": "Dora", "club": "x" * 300},
        {"external_id": "e", "name": "Emil", "club": None},
    ]
    counts, job_id = await run(bench, rows, map={"club": "team.name"}, on_missing="create")
    assert counts == {"inserted": 3, "rejected": 3}
    told = {row.row_no: row.message for row in await bench.verdicts(job_id)}
    assert "club: no team can be created, for name: String should have at most" in told[5]
    async with bench.sessions() as session:
        teams = (await session.execute(sa.text("SELECT name FROM team"))).scalars().all()
    assert teams == ["Ajax"]
    lines = [(x["action"], x["table_name"], x["rows"]) for x in await bench.audit(job_id)]
    assert lines == [("insert", "hero", 3), ("insert", "team", 1)]


async def test_missing_teams_become_null_on_request(bench: Bench) -> None:
    counts, _ = await run(
        bench,
        [{"external_id": "a", "name": "Ann", "club": "Ajax"}],
        map={"club": "team.name"},
        on_missing="null",
    )
    assert counts == {"inserted": 1}
    assert await heroes(bench, "name", "team_id") == [("Ann", None)]


async def test_updates_that_break_a_constraint_are_rejected_alone(bench: Bench) -> None:
    await run(bench, [{"external_id": x, "name": "Ann"} for x in "abc"])
    counts, job_id = await run(
        bench,
        [
            {"external_id": "a", "name": "Anna", "team_id": 4711},
            {"external_id": "b", "name": "Bert"},
            {"external_id": "c", "name": "Cleo", "team_id": None},
            {"external_id": "d", "name": "Dora", "team_id": 4711},
        ],
        on_conflict="update",
    )
    assert counts == {"updated": 2, "rejected": 2}
    codes = [(row.row_no, row.code) for row in await bench.verdicts(job_id)]
    assert codes == [(1, "foreign_key_violation"), (4, "foreign_key_violation")]


async def test_a_sensitive_value_that_was_there_is_kept_apart(bench: Bench) -> None:
    await run(bench, [{"external_id": "a", "name": "Ann", "secret_name": "Foxglove"}])
    _, job_id = await run(
        bench, [{"external_id": "a", "name": "Ann", "secret_name": "Ivy"}], on_conflict="update"
    )
    [line] = await bench.audit(job_id)
    assert "Foxglove" not in str(line)
    async with bench.sessions() as session:
        hidden = await session.scalar(
            sa.text("SELECT before_sensitive FROM bulwark.audit WHERE job_id = :job"),
            {"job": job_id},
        )
    assert hidden == {"secret_name": "Foxglove"}


async def test_what_another_transaction_changes_meanwhile_is_read_again_under_the_locks(
    bench: Bench, database_url: str
) -> None:
    """Beside a writer that never rests a chunk of many rows would never find them unchanged."""
    await execute(
        bench,
        "INSERT INTO hero (name, external_id) SELECT 'Old', n FROM generate_series(1, 9) AS n",
    )
    rows: Rows = [{"external_id": str(n), "name": f"New {n}"} for n in range(1, 11)]
    async with connected(database_url) as other:
        writing = other.transaction()
        await writing.start()
        await other.execute(
            "UPDATE hero SET name = 'Newer', age = 7 WHERE external_id IN ('3', '4')"
        )
        with capture_logs() as events:
            running = asyncio.create_task(run(bench, rows, on_conflict="update"))
            await until(lambda: waiting_for_a_lock(bench.sessions), "the import waits")
            await writing.commit()
            counts, job_id = await running
    assert counts == {"updated": 9, "inserted": 1}
    assert "transaction.replayed" not in {event["event"] for event in events}
    before = {str(line["before"]["name"]) for line in await bench.audit(job_id) if line["before"]}
    assert before == {"Old", "Newer"}
    assert {name for (name,) in await heroes(bench, "name")} == {one["name"] for one in rows}


async def test_a_sequence_that_lags_behind_is_a_clash_where_nothing_else_can_be_met(
    bench: Bench,
) -> None:
    await execute(bench, "INSERT INTO hero (name) VALUES ('Ann')")
    await execute(
        bench,
        "INSERT INTO transfer (id, hero_id) SELECT n, 1 FROM generate_series(1, 99) AS n",
    )
    payload = InsertRows(table="transfer", rows=[{"hero_id": 1}] * 3, on_conflict="update")
    job_id = await bench.run(payload)
    assert await bench.counts(job_id) == {"rejected": 3}
    assert {row.code for row in await bench.verdicts(job_id)} == {"unique_violation"}


async def test_a_team_that_an_update_does_not_write_is_not_created(bench: Bench) -> None:
    await execute(bench, "INSERT INTO hero (name, external_id) VALUES ('Ann', 'a')")
    rows: Rows = [{"external_id": "a", "name": "Anna", "club": "Ajax"}]
    options = {"on_conflict": "update", "update": ["name"], "on_missing": "create"}
    counts, _ = await run(bench, rows, map={"club": "team.name"}, **options)
    assert counts == {"updated": 1}
    assert await heroes(bench, "name", "team_id", "(SELECT count(*) FROM team)") == [
        ("Anna", None, 0)
    ]
