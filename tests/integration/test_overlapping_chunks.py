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
from jobs.update_rows import UpdateRows
from tests.inprocess import Bench
from tests.stage import connected
from tests.workers import until

HEROES: list[dict[str, Any]] = [{"external_id": str(n), "name": f"Hero {n}"} for n in range(30)]
IN_INPUT_ORDER = [one["name"] for one in HEROES]
WAITS_FOR_A_ROW = """
    SELECT (pg_blocking_pids(pid))[1] FROM pg_stat_activity
     WHERE datname = current_database() AND wait_event = 'transactionid' AND query LIKE 'COPY%'
"""
HAS_WRITTEN_ITS_RECEIPT = """
    SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
       AND state = 'idle in transaction' AND query LIKE 'UPDATE bulwark.chunk%'
"""
ONE_WAITS_AND_ONE_HAS_LOOKED = """
    SELECT count(*) FILTER (WHERE wait_event_type = 'Lock') = 1
           AND count(*) FILTER (WHERE query LIKE 'SELECT array_agg(DISTINCT row_no)%'
                                  AND state = 'idle in transaction') = 1
      FROM pg_stat_activity WHERE datname = current_database()
"""
TERMINATE_THE_OTHERS = """
    SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
     WHERE datname = current_database() AND state <> 'idle'
       AND pid NOT IN (pg_backend_pid(), $1)
"""


@pytest.fixture
async def obstacle(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    async with connected(database_url) as connection:
        yield connection


async def names(connection: asyncpg.Connection) -> list[str]:
    return [row["name"] for row in await connection.fetch("SELECT name FROM hero ORDER BY id")]


async def begun(bench: Bench, rows: list[dict[str, Any]]) -> tuple[UUID, "asyncio.Task[None]"]:
    """An import in chunks of ten, and its delivery under way."""
    payload = InsertRows(table="hero", rows=rows, chunk_rows=10)
    job_id = (await bench.producer.enqueue(payload)).job_id
    return job_id, asyncio.create_task(bench.deliver(job_id))


async def test_a_chunk_whose_transaction_is_lost_takes_the_one_behind_with_it(
    bench: Bench, connection: asyncpg.Connection, obstacle: asyncpg.Connection
) -> None:
    """The first chunk's rows are in, and one of the second waits for one of them, when it is lost.

    If the second stayed, it would have that row, and the first would wait for it for ever.
    """
    twice = [*HEROES[:15], {"external_id": "5", "name": "Twin"}, *HEROES[16:]]
    lock = obstacle.transaction()
    await lock.start()
    await obstacle.execute("LOCK TABLE bulwark.audit IN EXCLUSIVE MODE")
    job_id, running = await begun(bench, twice)

    async def second_waits_for_first() -> Any:
        return await connection.fetchval(WAITS_FOR_A_ROW)

    first = await until(second_waits_for_first, "the second chunk waits for the first")
    with capture_logs() as events:
        assert await connection.fetchval("SELECT pg_terminate_backend($1)", first)
        await until(
            lambda: _is_told(events, "transaction.replayed"), "the first chunk is tried again"
        )
        await lock.rollback()
        await running
    done = await bench.job(job_id)
    assert (done.state, done.attempt) == ("succeeded", 0)
    assert await names(connection) == [one for one in IN_INPUT_ORDER if one != "Hero 15"]
    assert await bench.counts(job_id) == {"inserted": 29, "rejected": 1}
    assert [row.row_no for row in await bench.verdicts(job_id)] == [16]


async def test_two_chunks_that_lose_their_connections_together_are_both_written(
    bench: Bench, connection: asyncpg.Connection, obstacle: asyncpg.Connection
) -> None:
    """The second waits for the first, and not for PostgreSQL, and so has noticed nothing yet."""
    await connection.execute(
        "INSERT INTO hero (name, age) SELECT 'Hero ' || n, 1 FROM generate_series(1, 20) AS n"
    )
    lock = obstacle.transaction()
    await lock.start()
    await obstacle.execute("SELECT FROM hero WHERE id = 1 FOR UPDATE")
    payload = UpdateRows(table="hero", keys=[*range(1, 21)], values={"age": 2}, chunk_rows=10)
    job_id = (await bench.producer.enqueue(payload)).job_id
    running = asyncio.create_task(bench.deliver(job_id))

    async def first_waits_and_second_for_it() -> Any:
        return await connection.fetchval(ONE_WAITS_AND_ONE_HAS_LOOKED)

    await until(first_waits_and_second_for_it, "the first waits for a row, the second for its turn")
    assert await connection.fetchval(TERMINATE_THE_OTHERS, obstacle.get_server_pid()) == 2
    await lock.rollback()
    async with asyncio.timeout(20):
        await running
    assert await bench.counts(job_id) == {"updated": 20}
    assert (
        await connection.fetchval("SELECT count(*) FROM hero WHERE age = 2 AND version = 2") == 20
    )


async def _is_told(events: list[Any], event: str) -> bool:
    return any(one["event"] == event for one in events)


async def test_no_chunk_commits_before_the_one_in_front(
    bench: Bench, connection: asyncpg.Connection, obstacle: asyncpg.Connection
) -> None:
    """The first chunk cannot write its verdicts; the second, which has none, is done."""
    rows = [{**one} for one in HEROES]
    rows[3]["age"] = -1
    lock = obstacle.transaction()
    await lock.start()
    await obstacle.execute("LOCK TABLE bulwark.verdict IN EXCLUSIVE MODE")
    job_id, running = await begun(bench, rows)
    await until(
        lambda: connection.fetchval(HAS_WRITTEN_ITS_RECEIPT), "the second chunk is ready to commit"
    )
    assert await connection.fetchval("SELECT count(*) FROM bulwark.chunk WHERE chunk_no > 0") == 0
    await lock.rollback()
    await running
    assert await bench.counts(job_id) == {"inserted": 29, "rejected": 1}


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
