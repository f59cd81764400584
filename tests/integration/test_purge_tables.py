"""Tables unlike those of the domain: that refer to themselves, are partitioned, delete along."""

import asyncio
from typing import Any
from uuid import UUID

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlmodel import Field, SQLModel
from structlog.testing import capture_logs

from db.columns import SoftDeletable
from db.registry import Model, Registry, discover_models
from jobs.purge_deleted_rows import PurgeDeletedRows
from tests.inprocess import Bench
from tests.stage import connected
from tests.workers import until

Sessions = async_sessionmaker[AsyncSession]
metadata = sa.MetaData()
GONE = "now() - interval '31 days'"


class Branch(SoftDeletable, SQLModel, table=True):
    metadata = metadata
    id: int = Field(primary_key=True)
    parent_id: int | None = Field(default=None, foreign_key="branch.id")


class Sale(SoftDeletable, SQLModel, table=True):
    metadata = metadata
    region: str = Field(primary_key=True)
    id: int = Field(primary_key=True)


TABLES = """
    CREATE TABLE branch (
        id int PRIMARY KEY, parent_id int REFERENCES branch, deleted_at timestamptz);
    CREATE INDEX ON branch (deleted_at, id);
    CREATE TABLE sale (region text, id int, deleted_at timestamptz, PRIMARY KEY (region, id))
        PARTITION BY LIST (region);
    CREATE TABLE sale_north PARTITION OF sale FOR VALUES IN ('north', 'east');
    CREATE TABLE sale_rest PARTITION OF sale DEFAULT;
    CREATE TABLE unmapped (branch int REFERENCES branch DEFERRABLE INITIALLY DEFERRED);
    CREATE TABLE along (note text, branch int REFERENCES branch ON DELETE CASCADE);
"""


@pytest.fixture
async def odd(sessions: Sessions, database_url: str, connection: asyncpg.Connection) -> Bench:
    """A bench that knows branches and sales."""
    await connection.execute(TABLES)
    example = discover_models()["hero"]
    rest = (example.create, example.public, example.update)
    known = [
        Model(name, metadata.tables[name], one, *rest)
        for name, one in (("branch", Branch), ("sale", Sale))
    ]
    return Bench(sessions, database_url, models=Registry({one.name: one for one in known}))


async def purge(bench: Bench, table: str, **request: Any) -> tuple[UUID, Any]:
    payload = {"retention_days": {table: 30}, "batch_rows": 2, "target_s": 60, **request}
    job_id = await bench.run(PurgeDeletedRows(**payload))
    row = await bench.job(job_id)
    assert row.state == "succeeded", row.error
    return job_id, row.outcome


async def ids(connection: asyncpg.Connection, table: str) -> list[int]:
    return [row["id"] for row in await connection.fetch(f"SELECT id FROM {table} ORDER BY id")]


CHAIN = f"""
    INSERT INTO branch SELECT n, nullif(n - 1, 0), {GONE} FROM generate_series(1, 7) AS n;
    INSERT INTO branch VALUES (10, NULL, {GONE}), (11, 10, {GONE}), (12, 11, NULL);
    INSERT INTO branch VALUES (20, NULL, {GONE}), (21, 20, {GONE});
    UPDATE branch SET parent_id = 21 WHERE id = 20;
"""


@pytest.mark.parametrize("cap", [None, 3])
async def test_a_table_that_refers_to_itself_is_removed_from_its_leaves_on(
    odd: Bench, connection: asyncpg.Connection, cap: int | None
) -> None:
    """A chain goes; what bears a living leaf stays, and so does a circle."""
    await connection.execute(CHAIN)

    _, foreseen = await purge(odd, "branch", dry_run=True, max_rows=cap)
    job_id, done = await purge(odd, "branch", max_rows=cap)

    assert (done["verdicts"], done["capped"]) == (foreseen["verdicts"], foreseen["capped"])
    if cap is None:
        assert await ids(connection, "branch") == [10, 11, 12, 20, 21]
        assert done["verdicts"] == {"purged": 7, "kept": 4}
        told = [one.message for one in await odd.verdicts(job_id)]
        assert "branch 11 is still referred to by branch.parent_id of 12" in told
    else:
        assert await ids(connection, "branch") == [1, 2, 3, 4, 10, 11, 12, 20, 21]


async def test_a_partitioned_table_with_a_key_of_two_columns_is_purged(
    odd: Bench, connection: asyncpg.Connection
) -> None:
    await connection.execute(
        f"INSERT INTO sale SELECT r, n, {GONE} FROM unnest(ARRAY['north', 'east', 'south']) AS r,"
        " generate_series(1, 5) AS n;"
        "INSERT INTO sale VALUES ('north', 6, NULL), ('south', 7, now())"
    )

    job_id, done = await purge(odd, "sale")

    assert await ids(connection, "sale") == [6, 7]
    assert done["verdicts"] == {"purged": 15}
    keys = [tuple(key) for line in await odd.audit(job_id) for key in line["keys"]["keys"]]
    assert sorted(keys) == [
        (r, str(n)) if isinstance(keys[0][1], str) else (r, n)
        for r in ("east", "north", "south")
        for n in range(1, 6)
    ]


async def test_a_table_without_a_model_keeps_what_it_refers_to(
    odd: Bench, connection: asyncpg.Connection
) -> None:
    await connection.execute(
        f"INSERT INTO branch SELECT n, NULL, {GONE} FROM generate_series(1, 3) AS n;"
        "INSERT INTO unmapped VALUES (2)"
    )

    job_id, done = await purge(odd, "branch")

    assert await ids(connection, "branch") == [2]
    assert done["verdicts"] == {"purged": 2, "kept": 1}
    [kept] = await odd.verdicts(job_id)
    assert kept.message == "branch 2 is still referred to by unmapped.branch"


async def test_a_key_that_deletes_along_takes_nothing_with_it(
    odd: Bench, connection: asyncpg.Connection
) -> None:
    await connection.execute(
        f"INSERT INTO branch SELECT n, NULL, {GONE} FROM generate_series(1, 5) AS n;"
        "INSERT INTO along VALUES ('alive', 4)"
    )

    _, done = await purge(odd, "branch")

    assert await ids(connection, "branch") == [4]
    assert await connection.fetchval("SELECT note FROM along") == "alive"
    assert done["verdicts"] == {"purged": 4, "kept": 1}


async def test_a_table_that_has_no_retention_or_is_none_is_refused(odd: Bench) -> None:
    async def error_of(**request: Any) -> str:
        row = await odd.job(await odd.run(PurgeDeletedRows(**request)))
        assert (row.state, row.reason) == ("failed", "rejected")
        return str(row.error)

    assert "branch has no retention; add it to BULWARK_RETENTION_DAYS" in await error_of(
        tables=["branch"]
    )
    assert "No table has a retention" in await error_of()
    assert "did you mean branch?" in await error_of(tables=["brunch"])
    assert "did you mean sale?" in await error_of(retention_days={"sales": 3})


# References that are made while a batch is at work

HELD_UP = """
    CREATE FUNCTION hold_up() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        PERFORM pg_advisory_xact_lock_shared(7);
        RETURN OLD;
    END $$;
    CREATE TRIGGER hold_up BEFORE DELETE ON branch EXECUTE FUNCTION hold_up()
"""
"""Stops a batch that has its snapshot and has not yet locked its rows."""


async def test_a_reference_that_a_batch_did_not_see_replays_it(
    odd: Bench, connection: asyncpg.Connection
) -> None:
    await connection.execute(
        f"DROP TABLE along; INSERT INTO branch VALUES (1, NULL, {GONE});" + HELD_UP
    )
    purging = await held_up(odd, connection)
    with capture_logs() as events:
        await connection.execute("INSERT INTO unmapped (branch) VALUES (1)")
        await connection.execute("SELECT pg_advisory_unlock(7)")
        _, done = await purging

    [replayed] = [one for one in events if one["event"] == "transaction.replayed"]
    assert replayed["reason"] == "Race: a row of branch is referred to by now"
    assert await ids(connection, "branch") == [1]
    assert done["verdicts"] == {"kept": 1}


async def test_a_key_that_deletes_along_takes_no_row_that_a_batch_did_not_see(
    odd: Bench, connection: asyncpg.Connection, database_url: str
) -> None:
    """Whoever refers to a row that is about to go waits, and is told that it has gone."""
    await connection.execute(f"INSERT INTO branch VALUES (1, NULL, {GONE});" + HELD_UP)
    purging = await held_up(odd, connection)
    async with connected(database_url) as other:
        referring = asyncio.create_task(other.execute("INSERT INTO along VALUES ('alive', 1)"))
        waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted"
        await until(lambda: connection.fetchval(waits), "the reference waits", 5.0)
        await connection.execute("SELECT pg_advisory_unlock(7)")
        _, done = await purging
        with pytest.raises(asyncpg.ForeignKeyViolationError):
            await referring
    assert done["verdicts"] == {"purged": 1}


async def held_up(bench: Bench, connection: asyncpg.Connection) -> "asyncio.Task[Any]":
    """A purge that has begun its first batch and stands still."""
    await connection.execute("SELECT pg_advisory_lock(7)")
    purging = asyncio.create_task(purge(bench, "branch"))
    waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    await until(lambda: connection.fetchval(waits), "the batch is held up")
    return purging
