"""The ledger grows old: months, jobs, keys, workers and parked messages go in time."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from structlog.testing import capture_logs

from db.ledger.rotation import ROTATED
from jobs.maintain_ledger import MaintainLedger
from tests.inprocess import Bench
from tests.months import id_at, make_month
from tests.stage import connected
from tests.workers import until

NOW = datetime.now(UTC)


async def make_job(connection: asyncpg.Connection, at: datetime, state: str = "succeeded") -> UUID:
    """A job that was accepted then and ended at once, if it has ended."""
    job_id = id_at(at)
    ended = None if state in ("queued", "running") else at
    await connection.execute(
        "INSERT INTO bulwark.job (id, kind, payload, state, max_attempts, timeout_s, finished_at)"
        " VALUES ($1, 'old', '{}', $2, 1, 1, $3)",
        *(job_id, state, ended),
    )
    return job_id


async def tables(connection: asyncpg.Connection) -> set[str]:
    sql = "SELECT relname FROM pg_class WHERE relnamespace = 'bulwark'::regnamespace"
    return {row["relname"] for row in await connection.fetch(sql)}


async def maintain(bench: Bench, **days: int) -> tuple[UUID, dict[str, object]]:
    job_id = await bench.run(MaintainLedger.model_validate({"retention_days": days}))
    row = await bench.job(job_id)
    assert row.state == "succeeded", row.error
    outcome: Any = row.outcome
    return job_id, outcome


async def test_months_past_their_retention_are_dropped_and_told_in_the_audit(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    long_ago = NOW - timedelta(days=400)
    names = {table: await make_month(connection, table, long_ago) for table in ROTATED}

    job_id, outcome = await maintain(bench, chunk=300, verdict=500, audit=300)

    assert outcome["chunk"] == {"dropped": [names["chunk"]], "strays": 0}
    there = await tables(connection)
    assert {names["verdict"], names["spool"], "chunk_default"} <= there
    assert there.isdisjoint({names["chunk"], names["audit"]})
    lines = [(one["action"], one["table_name"], one["keys"]) for one in await bench.audit(job_id)]
    assert ("drop", "bulwark.audit", {"keys": [[names["audit"]]]}) in lines


async def test_it_waits_for_no_lock_for_long_and_goes_on_when_it_is_free(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await connection.execute("BEGIN; SELECT bulwark.ensure_partitions()")
    with capture_logs() as logs:
        running = asyncio.create_task(maintain(bench))

        async def has_tried() -> bool:
            return "transaction.replayed" in [one["event"] for one in logs]

        await until(has_tried, "it tries again", 8)
        await connection.execute("ROLLBACK")
        await running


@pytest.mark.parametrize(
    ("state", "kept"),
    [("queued", ROTATED), ("failed", ("chunk", "spool")), ("cancelled", ("chunk", "spool"))],
)
async def test_a_month_of_a_job_that_may_still_run_is_kept(
    bench: Bench, connection: asyncpg.Connection, state: str, kept: tuple[str, ...]
) -> None:
    long_ago = NOW - timedelta(days=400)
    names = {table: await make_month(connection, table, long_ago) for table in ROTATED}
    await make_job(connection, long_ago, state)

    await maintain(bench, **dict.fromkeys(ROTATED, 30))

    there = await tables(connection)
    assert {table for table in ROTATED if names[table] in there} == set(kept)


async def test_a_month_that_others_work_in_is_left_for_the_next_time(
    bench: Bench, connection: asyncpg.Connection, database_url: str
) -> None:
    name = await make_month(connection, "verdict", NOW - timedelta(days=400))
    async with connected(database_url) as other, other.transaction():
        await other.execute("SELECT FROM bulwark.verdict LIMIT 1")
        _, outcome = await maintain(bench, verdict=30)
    assert "others hold verdict" in str(outcome["verdict"])
    assert name in await tables(connection)


async def test_rows_in_no_month_go_in_batches_but_those_of_jobs_that_may_still_run(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    long_ago = NOW - timedelta(days=4000)
    waiting = await make_job(connection, long_ago, "queued")
    for job_id in (waiting, *(id_at(long_ago) for _ in range(7))):
        await connection.execute(
            "INSERT INTO bulwark.spool (job_id, part_no, data) VALUES ($1, 0, '')", job_id
        )

    job_id = await bench.run(MaintainLedger(retention_days={"spool": 30}, batch_rows=3))

    assert await connection.fetchval("SELECT array_agg(job_id) FROM bulwark.spool") == [waiting]
    assert (await bench.tally(job_id)).counts == {"purged": 7}


async def test_jobs_that_ended_long_ago_go_unless_their_key_is_remembered(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    long_ago = NOW - timedelta(days=40)
    for state in ("succeeded", "failed", "cancelled"):
        await make_job(connection, long_ago, state)
    kept = {
        await make_job(connection, long_ago, "queued"),
        await make_job(connection, NOW - timedelta(days=20)),
        (keyed := await make_job(connection, long_ago)),
    }
    await connection.execute(
        "INSERT INTO bulwark.idempotency VALUES ('k', $1, '', now() + interval '1 day'),"
        " ('old', $1, '', now() - interval '1 day')",
        keyed,
    )

    job_id, outcome = await maintain(bench, job=30)

    assert (outcome["job"], outcome["idempotency"]) == (3, 1)
    left = {row["id"] for row in await connection.fetch("SELECT id FROM bulwark.job")}
    assert left == {*kept, job_id}


async def test_what_has_no_retention_stays(bench: Bench, connection: asyncpg.Connection) -> None:
    name = await make_month(connection, "chunk", NOW - timedelta(days=4000))
    old = await make_job(connection, NOW - timedelta(days=4000))
    await connection.execute(
        "INSERT INTO bulwark.parked (queue, arq_id, digest, reason, parked_at)"
        " VALUES ('q', 'a', '', 'gone', now() - interval '40 days')"
    )

    _, outcome = await maintain(bench)
    assert outcome == {"idempotency": 0, "worker": 0}
    assert name in await tables(connection)
    assert await connection.fetchval("SELECT count(*) FROM bulwark.job WHERE id = $1", old) == 1

    _, outcome = await maintain(bench, parked=30)
    assert outcome["parked"] == 1
