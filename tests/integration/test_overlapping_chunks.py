"""Chunks of one import that are under way at the same time, on several connections or on one."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from structlog.testing import capture_logs

from db.engine import make_sessions
from jobs.insert_rows import InsertRows
from tests.inprocess import Bench
from tests.stage import connected, waiting_for_a_lock
from tests.workers import until

HEROES: list[dict[str, Any]] = [{"external_id": str(n), "name": f"Hero {n}"} for n in range(30)]
IN_INPUT_ORDER = [one["name"] for one in HEROES]
OPTIONS: dict[str, dict[str, Any]] = {
    "inserted": {"on_conflict": "reject"},
    "updated": {"on_conflict": "update"},
}
WAITING = """
    SELECT pid FROM pg_stat_activity WHERE datname = current_database()
       AND wait_event_type = 'Lock' AND query LIKE 'INSERT INTO bulwark.audit%' ORDER BY xact_start
"""
IN_TRANSACTION = """
    SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
       AND xact_start IS NOT NULL AND query NOT LIKE '%pg_stat_activity%'
"""


@pytest.fixture
async def obstacle(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    async with connected(database_url) as connection:
        yield connection


async def names(connection: asyncpg.Connection) -> list[str]:
    return [row["name"] for row in await connection.fetch("SELECT name FROM hero ORDER BY id")]


async def enqueue(bench: Bench, **options: Any) -> UUID:
    payload = InsertRows(table="hero", rows=HEROES, chunk_rows=10, **options)
    return (await bench.producer.enqueue(payload)).job_id


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
async def test_a_chunk_whose_transaction_is_lost_takes_the_one_behind_with_it(
    bench: Bench, connection: asyncpg.Connection, obstacle: asyncpg.Connection, options: Any
) -> None:
    """The first chunk's rows are in, and the second has begun, when the first loses its backend."""
    job_id = await enqueue(bench, **options)
    lock = obstacle.transaction()
    await lock.start()
    await obstacle.execute("LOCK TABLE bulwark.audit IN EXCLUSIVE MODE")
    running = asyncio.create_task(bench.deliver(job_id))

    async def two_under_way() -> bool:
        waits = bool(await connection.fetch(WAITING))
        return waits and await connection.fetchval(IN_TRANSACTION) >= 3

    await until(two_under_way, "the second chunk has begun behind the first")
    first = await connection.fetchval(WAITING)
    with capture_logs() as events:
        assert await connection.fetchval("SELECT pg_terminate_backend($1)", first)
        await until(
            lambda: _is_told(events, "transaction.replayed"), "the first chunk is tried again"
        )
        await lock.rollback()
        await running
    done = await bench.job(job_id)
    assert (done.state, done.attempt) == ("succeeded", 0)
    assert await names(connection) == IN_INPUT_ORDER
    assert await bench.counts(job_id) == {"inserted": 30}
    assert sum(line["rows"] for line in await bench.audit(job_id)) == len(HEROES)


async def _is_told(events: list[Any], event: str) -> bool:
    return any(one["event"] == event for one in events)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
async def test_no_chunk_commits_before_the_one_in_front(
    bench: Bench, connection: asyncpg.Connection, obstacle: asyncpg.Connection, options: Any
) -> None:
    """A row of the first chunk clashes with one that another transaction has not committed yet."""
    lock = obstacle.transaction()
    await lock.start()
    await obstacle.execute("INSERT INTO hero (name, external_id) VALUES ('Other', '5')")
    job_id = await enqueue(bench, **options)
    running = asyncio.create_task(bench.deliver(job_id))
    await until(lambda: waiting_for_a_lock(bench.sessions), "the first chunk waits")
    assert await connection.fetchval("SELECT count(*) FROM bulwark.chunk WHERE chunk_no > 0") == 0
    await lock.commit()
    await running
    told = {"inserted": 29, "updated" if options["on_conflict"] == "update" else "rejected": 1}
    assert await bench.counts(job_id) == told
    assert [name for name in await names(connection) if name != "Other"][-29:] == [
        name for name in IN_INPUT_ORDER if name != "Hero 5"
    ]


async def test_a_chunk_of_bad_rows_ends_the_import_before_the_one_behind_has_an_effect(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    rows: list[dict[str, Any]] = [{"external_id": str(n), "name": "Hero"} for n in range(30)]
    for row in rows[10:13]:
        row["age"] = -1
    job_id = await bench.run(InsertRows(table="hero", rows=rows, chunk_rows=10, max_rejects=2))
    assert (await bench.job(job_id)).reason == "rejected"
    assert await bench.counts(job_id) == {"inserted": 10, "rejected": 3, "not_reached": 17}
    assert await connection.fetchval("SELECT count(*) FROM hero") == 10


@pytest.mark.parametrize("atomic", [True, False])
async def test_an_import_needs_no_more_than_one_connection(
    connection: asyncpg.Connection, database_url: str, atomic: bool
) -> None:
    """As when all others of the pool are taken by imports that wait for one more, too."""
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0, pool_timeout=60)
    rows: list[dict[str, Any]] = [{**one, "club": f"Team {n % 3}"} for n, one in enumerate(HEROES)]
    bench = Bench(make_sessions(engine), database_url)
    job_id = await bench.run(
        InsertRows(
            table="hero",
            rows=rows,
            map={"club": "team.name"},
            on_missing="create",
            on_conflict="update",
            chunk_rows=10,
            atomic=atomic,
        )
    )
    assert await bench.counts(job_id) == {"inserted": 30}
    assert await connection.fetchval("SELECT count(*) FROM team") == 3
    await engine.dispose()
