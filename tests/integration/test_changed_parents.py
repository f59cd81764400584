"""What an input names by natural key changes between the look-up and the chunk's transaction."""

import asyncio
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from jobs._bulk_write import STALE_TRIES
from jobs.insert_rows import InsertRows
from jobs.update_rows import UpdateRows
from tests.inprocess import Bench
from tests.invariants import Losses, check_invariants
from tests.sample_jobs.act_out import GATE
from tests.workers import until

GATED_SECOND_CHUNK = f"""
    CREATE SEQUENCE tries;
    CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        PERFORM pg_advisory_xact_lock_shared({GATE} + nextval('tries'));
        RETURN NEW;
    END $$;
    CREATE TRIGGER gate BEFORE INSERT ON bulwark.chunk FOR EACH ROW
        WHEN (NEW.chunk_no = 2) EXECUTE FUNCTION wait_at_gate()
"""
"""Each try of the second chunk waits, once it is prepared and has begun, at a gate of its own."""
WAITS = """
    SELECT EXISTS (SELECT FROM pg_locks
                    WHERE locktype = 'advisory' AND NOT granted AND objid = $1 AND database =
                          (SELECT oid FROM pg_database WHERE datname = current_database()))
"""
FIRST_IS_THERE = "SELECT EXISTS (SELECT FROM bulwark.chunk WHERE chunk_no = 1)"
TEAMS = "INSERT INTO team (name) VALUES ('Red'), ('Blue'), ('White')"
RED, BLUE, WHITE = 1, 2, 3
ANOTHER_GETS_ITS_NAME = """
    UPDATE team SET name = 'Old Red' WHERE id = 1;
    UPDATE team SET name = 'Red' WHERE id = 3
"""
TWO_CHANGE_THEIR_NAMES = """
    UPDATE team SET name = 'nobody' WHERE name = 'Red';
    UPDATE team SET name = 'Red' WHERE name = 'White';
    UPDATE team SET name = 'White' WHERE name = 'nobody'
"""
GONE = pytest.mark.parametrize(
    "gone",
    [
        pytest.param("UPDATE team SET name = 'Old Red' WHERE id = 1", id="renamed"),
        pytest.param("UPDATE team SET deleted_at = now() WHERE id = 1", id="hidden"),
        pytest.param("DELETE FROM team WHERE id = 1", id="removed"),
    ],
)
Where = list[tuple[str, int | None]]
"""The heroes by name, each with the team that it is in."""


class Gates:
    """Where the tries of the second chunk wait until they are let through."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def close(self, tries: int) -> None:
        await self._connection.execute(GATED_SECOND_CHUNK)
        await self._connection.execute(
            f"SELECT pg_advisory_lock({GATE} + n) FROM generate_series(1, {tries}) AS n"
        )

    async def reached(self, number: int, running: "asyncio.Task[None]") -> None:
        """Return when this try of the running job waits."""

        async def waits() -> bool:
            assert not running.done(), f"the job has ended before try {number}"
            return bool(await self._connection.fetchval(WAITS, GATE + number))

        await until(waits, f"try {number} of the second chunk waits")

    async def first_is_committed(self) -> None:
        """Return when the chunk in front is there; at the first try it may be under way."""

        async def is_there() -> bool:
            return bool(await self._connection.fetchval(FIRST_IS_THERE))

        await until(is_there, "the first chunk is committed")

    async def open(self, number: int) -> None:
        await self._connection.execute(f"SELECT pg_advisory_unlock({GATE} + {number})")


async def run_changing(
    bench: Bench,
    connection: asyncpg.Connection,
    payload: InsertRows | UpdateRows,
    change: str,
    tries: int = 1,
) -> UUID:
    """Run the job to its end, with a change each time that its second chunk has been prepared."""
    gates = Gates(connection)
    await gates.close(tries)
    job_id = (await bench.producer.enqueue(payload, attempts=1)).job_id
    running = asyncio.create_task(bench.deliver(job_id))
    for number in range(1, tries + 1):
        await gates.reached(number, running)
        if not payload.atomic:
            await gates.first_is_committed()
        await connection.execute(change)
        await gates.open(number)
    await running
    return job_id


def heroes(*teams: str, **request: Any) -> InsertRows:
    """Heroes called by their number, two to a chunk, in these teams."""
    return InsertRows(
        table="hero",
        rows=[
            {"name": str(number), "external_id": str(number), "team": team}
            for number, team in enumerate(teams, 1)
        ],
        map={"team": "team.name"},
        chunk_rows=2,
        **request,
    )


async def where(connection: asyncpg.Connection) -> Where:
    found = await connection.fetch("SELECT name, team_id FROM hero ORDER BY name")
    return [(one["name"], one["team_id"]) for one in found]


async def refused(bench: Bench, job_id: UUID) -> Sequence[tuple[int, str]]:
    return [(one.row_no, one.code) for one in await bench.verdicts(job_id)]


@pytest.fixture
async def teams(connection: asyncpg.Connection) -> None:
    await connection.execute(TEAMS)


pytestmark = pytest.mark.usefixtures("teams")


@pytest.mark.parametrize("on_conflict", ["reject", "skip", "update"])
async def test_rows_go_to_the_row_that_has_the_name_when_their_chunk_begins(
    on_conflict: str, bench: Bench, connection: asyncpg.Connection, database_url: str
) -> None:
    payload = heroes("Red", "Blue", "Red", "Blue", "Red", "Blue", on_conflict=on_conflict)
    job_id = await run_changing(bench, connection, payload, ANOTHER_GETS_ITS_NAME)
    done = await bench.job(job_id)
    assert (done.state, done.attempt) == ("succeeded", 0), done.error
    assert await where(connection) == [
        ("1", RED),
        ("2", BLUE),
        ("3", WHITE),
        ("4", BLUE),
        ("5", WHITE),
        ("6", BLUE),
    ]
    assert await bench.counts(job_id) == {"inserted": 6}
    assert await check_invariants(database_url, seeded={"team": 3}) == Losses()


async def test_rows_that_are_there_are_led_to_the_row_that_has_the_name_when_their_chunk_begins(
    bench: Bench, connection: asyncpg.Connection, database_url: str
) -> None:
    await connection.execute(
        "INSERT INTO hero (name) VALUES ('Ann'), ('Bob'), ('Cid');"
        f"INSERT INTO membership (hero_id, team_id, role) SELECT id, {BLUE}, 'scout' FROM hero"
    )
    payload = UpdateRows(
        table="membership",
        rows=[{"id": number, "team": "Red"} for number in (1, 2, 3)],
        map={"team": "team.name"},
        chunk_rows=1,
    )
    job_id = await run_changing(bench, connection, payload, ANOTHER_GETS_ITS_NAME)
    assert await bench.counts(job_id) == {"updated": 3}
    found = await connection.fetch("SELECT team_id FROM membership ORDER BY id")
    assert [one["team_id"] for one in found] == [RED, WHITE, WHITE]
    assert await check_invariants(database_url) == Losses()


@GONE
async def test_rows_whose_parent_goes_away_meanwhile_are_rejected_and_no_others(
    gone: str, bench: Bench, connection: asyncpg.Connection, database_url: str
) -> None:
    payload = heroes("Blue", "Blue", "Red", "Blue", "Red", "Blue")
    job_id = await run_changing(bench, connection, payload, gone)
    assert await bench.counts(job_id) == {"inserted": 4, "rejected": 2}
    assert await refused(bench, job_id) == [(3, "missing_reference"), (5, "missing_reference")]
    assert await where(connection) == [("1", BLUE), ("2", BLUE), ("4", BLUE), ("6", BLUE)]
    assert (await bench.report(job_id)).adds_up
    assert await check_invariants(database_url, seeded=await seeded(connection)) == Losses()


async def seeded(connection: asyncpg.Connection) -> dict[str, int]:
    """The teams that are left of those that the test has made."""
    return {"team": await connection.fetchval("SELECT count(*) FROM team WHERE id <= 3")}


@GONE
async def test_a_parent_that_goes_away_meanwhile_leaves_a_null_where_that_is_wanted(
    gone: str, bench: Bench, connection: asyncpg.Connection
) -> None:
    payload = heroes("Blue", "Blue", "Red", "Blue", on_missing="null")
    job_id = await run_changing(bench, connection, payload, gone)
    assert await bench.counts(job_id) == {"inserted": 4}
    assert await where(connection) == [("1", BLUE), ("2", BLUE), ("3", None), ("4", BLUE)]


@pytest.mark.parametrize("atomic", [False, True])
@GONE
async def test_a_parent_that_goes_away_meanwhile_is_created_once_where_that_is_wanted(
    gone: str, atomic: bool, bench: Bench, connection: asyncpg.Connection, database_url: str
) -> None:
    payload = heroes("Blue", "Blue", "Red", "Blue", "Red", on_missing="create", atomic=atomic)
    job_id = await run_changing(bench, connection, payload, gone)
    assert await bench.counts(job_id) == {"inserted": 5}
    new = await connection.fetchval(
        "SELECT id FROM team WHERE name = 'Red' AND deleted_at IS NULL AND id > 3"
    )
    assert await where(connection) == [
        ("1", BLUE),
        ("2", BLUE),
        ("3", new),
        ("4", BLUE),
        ("5", new),
    ]
    assert await check_invariants(database_url, seeded=await seeded(connection)) == Losses()


@pytest.mark.parametrize("on_missing", ["reject", "create"])
async def test_an_import_whose_parents_change_each_time_ends_in_a_sentence_with_nothing_half_done(
    on_missing: str, bench: Bench, connection: asyncpg.Connection, database_url: str
) -> None:
    teams = ("Red", "Blue", "Red", "Green", "Red", "Blue")
    payload = heroes(*teams, on_missing=on_missing)
    change = TWO_CHANGE_THEIR_NAMES
    job_id = await run_changing(bench, connection, payload, change, STALE_TRIES)
    done = await bench.job(job_id)
    assert (done.state, done.reason) == ("failed", "rejected")
    assert done.error == (
        f"the rows that chunk 2 refers to changed {STALE_TRIES} times while it was written; "
        "run the job when they are at rest"
    )
    assert await where(connection) == [("1", RED), ("2", BLUE)]
    assert await bench.counts(job_id) == {"inserted": 2, "not_reached": 4}
    assert (await bench.report(job_id)).adds_up
    assert await check_invariants(database_url, seeded={"team": 3}) == Losses()


async def test_all_rows_of_an_atomic_import_go_to_the_row_that_has_the_name_at_last(
    bench: Bench, connection: asyncpg.Connection, database_url: str
) -> None:
    payload = heroes("Red", "Blue", "Red", "Blue", "Red", atomic=True)
    job_id = await run_changing(bench, connection, payload, ANOTHER_GETS_ITS_NAME)
    assert await bench.counts(job_id) == {"inserted": 5}
    assert await where(connection) == [
        ("1", WHITE),
        ("2", BLUE),
        ("3", WHITE),
        ("4", BLUE),
        ("5", WHITE),
    ]
    assert await check_invariants(database_url, seeded={"team": 3}) == Losses()


@GONE
async def test_an_atomic_import_whose_parent_goes_away_meanwhile_inserts_nothing_and_says_why(
    gone: str, bench: Bench, connection: asyncpg.Connection, database_url: str
) -> None:
    payload = heroes("Blue", "Blue", "Red", "Blue", "Blue", atomic=True)
    job_id = await run_changing(bench, connection, payload, gone)
    done = await bench.job(job_id)
    assert (done.state, done.reason) == ("failed", "rejected")
    assert await bench.counts(job_id) == {"rejected": 1, "not_reached": 4}
    assert await refused(bench, job_id) == [(3, "missing_reference")]
    assert await where(connection) == []
    assert await check_invariants(database_url, seeded=await seeded(connection)) == Losses()


async def test_an_atomic_import_whose_parents_change_each_time_ends_with_nothing_done(
    bench: Bench, connection: asyncpg.Connection, database_url: str
) -> None:
    payload = heroes("Red", "Blue", "Red", "Green", "Red", on_missing="create", atomic=True)
    change = TWO_CHANGE_THEIR_NAMES
    job_id = await run_changing(bench, connection, payload, change, STALE_TRIES)
    done = await bench.job(job_id)
    assert done.state == "failed"
    assert done.error == (
        "Race: the rows that chunk 2 refers to changed while it was written; "
        "run the job when they are at rest"
    )
    assert await where(connection) == []
    assert await bench.counts(job_id) == {"not_reached": 5}
    assert (await bench.report(job_id)).adds_up
    assert await check_invariants(database_url, seeded={"team": 3}) == Losses()
