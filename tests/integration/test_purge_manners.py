"""A purge beside others: it waits for them, stops when it is told to, and comes back."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from structlog.testing import capture_logs

from db.ledger import halt
from db.transaction import transaction
from jobs import _pauses
from jobs.purge_deleted_rows import PurgeDeletedRows
from tests.inprocess import Bench
from tests.stage import Stage, connected
from tests.workers import until
from worker.reports import read_job

Sessions = async_sessionmaker[AsyncSession]
KIND = "purge_deleted_rows"
STOP_AFTER_DELETE = """
    CREATE FUNCTION stop() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO bulwark.halt (kind, reason, actor)
        VALUES ('purge_deleted_rows', 'month end', 'Zoë') ON CONFLICT DO NOTHING;
        RETURN NULL;
    END $$;
    CREATE TRIGGER stop AFTER DELETE ON hero EXECUTE FUNCTION stop()
"""


@pytest.fixture
async def heroes(connection: asyncpg.Connection) -> list[int]:
    """Twenty that were deleted together, long ago."""
    rows = await connection.fetch(
        "INSERT INTO hero (name, deleted_at) SELECT 'Ann', now() - interval '31 days'"
        " FROM generate_series(1, 20) RETURNING id"
    )
    return [row["id"] for row in rows]


def request(**more: Any) -> PurgeDeletedRows:
    return PurgeDeletedRows(**{"retention_days": {"hero": 30}, "target_s": 60, **more})


async def left(connection: asyncpg.Connection) -> list[int]:
    return [row["id"] for row in await connection.fetch("SELECT id FROM hero ORDER BY id")]


async def note_of(sessions: Sessions, job_id: UUID) -> str | None:
    async with sessions() as session:
        return (await read_job(session, job_id, 15.0)).pause


async def test_a_row_that_somebody_else_has_locked_is_kept_and_goes_the_next_time(
    bench: Bench, connection: asyncpg.Connection, heroes: list[int]
) -> None:
    async with connection.transaction():
        await connection.execute("SELECT FROM hero WHERE id = $1 FOR UPDATE", heroes[3])
        job_id = await bench.run(request(batch_rows=4))

    assert await left(connection) == [heroes[3]]
    [kept] = await bench.verdicts(job_id)
    assert (kept.verdict, kept.code) == ("kept", "locked")
    assert await bench.counts(job_id) == {"purged": 19, "kept": 1}
    await bench.run(request())
    assert await left(connection) == []


async def test_a_row_that_is_free_again_goes_at_the_end(
    bench: Bench, connection: asyncpg.Connection, heroes: list[int], stage: Stage
) -> None:
    """The lock is given back when the next table is begun."""
    await connection.execute(
        "CREATE FUNCTION let_go() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " PERFORM pg_advisory_xact_lock(1); RETURN OLD; END $$;"
        "CREATE TRIGGER let_go BEFORE DELETE ON team FOR EACH ROW EXECUTE FUNCTION let_go()"
    )
    await connection.execute(
        "INSERT INTO team (name, deleted_at) VALUES ('Red', now() - interval '31 days')"
    )
    await stage.value("SELECT pg_advisory_lock(1)")
    locking = connection.transaction()
    await locking.start()
    await connection.execute("SELECT FROM hero WHERE id = $1 FOR UPDATE", heroes[3])
    retention = {"hero": 30, "team": 30}
    purging = asyncio.create_task(bench.run(request(retention_days=retention)))
    waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    await until(lambda: stage.value(waits), "the purge has come to the team")
    await locking.rollback()
    await stage.value("SELECT pg_advisory_unlock(1)")

    job_id = await purging
    assert await bench.counts(job_id) == {"purged": 21}
    assert await left(connection) == []


async def test_a_purge_that_was_stopped_is_put_off_and_goes_on_where_it_was(
    bench: Bench, connection: asyncpg.Connection, sessions: Sessions, heroes: list[int]
) -> None:
    await connection.execute(STOP_AFTER_DELETE)
    job_id = await bench.run(request(batch_rows=5))

    row = await bench.job(job_id)
    assert (row.state, row.reason, row.attempt) == ("queued", "deferred", 0)
    assert "stopped by Zoë since" in str(row.error)
    assert "month end" in str(row.error)
    assert await left(connection) == heroes[5:]

    await connection.execute("DROP TRIGGER stop ON hero")
    lifted = await transaction(sessions, lambda s: halt.lift(s, KIND), name="test.lift")
    again = await transaction(sessions, lambda s: halt.lift(s, KIND), name="test.lift")
    assert (lifted, again) == (True, False)
    await bench.deliver(job_id)
    assert await left(connection) == []
    assert (await bench.job(job_id)).state == "succeeded"
    assert await bench.counts(job_id) == {"purged": 20}


async def test_the_cap_counts_what_went_before_the_purge_was_interrupted(
    bench: Bench, connection: asyncpg.Connection, sessions: Sessions, heroes: list[int]
) -> None:
    await connection.execute(STOP_AFTER_DELETE)
    job_id = await bench.run(request(batch_rows=5, max_rows=12))
    await connection.execute("DROP TRIGGER stop ON hero")
    await transaction(sessions, lambda s: halt.lift(s, KIND), name="test.lift")
    await bench.deliver(job_id)

    row: Any = await bench.job(job_id)
    assert (row.state, row.outcome["capped"]) == ("succeeded", True)
    assert await left(connection) == heroes[12:]


async def test_a_stop_concerns_a_purge_that_begins_later(
    bench: Bench, connection: asyncpg.Connection, sessions: Sessions, heroes: list[int]
) -> None:
    stop = transaction(sessions, lambda s: halt.stop(s, KIND, "audit", None), name="test.stop")
    await stop

    job_id = await bench.run(request())

    assert (await bench.job(job_id)).reason == "deferred"
    assert await left(connection) == heroes


async def test_it_waits_while_others_wait_for_the_table_and_says_so(
    bench: Bench,
    connection: asyncpg.Connection,
    sessions: Sessions,
    database_url: str,
    heroes: list[int],
) -> None:
    """One holds a row, another waits for it; the purge could go on, and does not."""
    alive = await connection.fetchval("INSERT INTO hero (name) VALUES ('Bob') RETURNING id")
    update = "UPDATE hero SET age = 7 WHERE id = $1"
    with capture_logs() as events:
        async with connected(database_url) as other:
            holding = connection.transaction()
            await holding.start()
            await connection.execute(update, alive)
            waiting = asyncio.create_task(other.execute(update, alive))
            await until(lambda: _waits(connection), "the other one waits")
            accepted = await bench.producer.enqueue(request())
            purging = asyncio.create_task(bench.deliver(accepted.job_id))
            said = await until(lambda: note_of(sessions, accepted.job_id), "the purge waits")
            assert said == "1 others wait for locks on hero"
            assert await left(connection) == [*heroes, alive]
            await holding.commit()
            await waiting
        await purging

    assert await left(connection) == [alive]
    assert await note_of(sessions, accepted.job_id) is None
    told = [one["event"] for one in events if one["event"].startswith("purge.")]
    assert told == ["purge.paused", "purge.resumed"]


async def _waits(connection: asyncpg.Connection) -> bool:
    sql = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'"
    return bool(await connection.fetchval(sql))


async def test_it_is_put_off_when_it_would_have_to_wait_for_long(
    bench: Bench,
    connection: asyncpg.Connection,
    database_url: str,
    heroes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_pauses, "LONGEST_PAUSE_S", 0.0)
    lock = "BEGIN; LOCK TABLE hero IN SHARE MODE; COMMIT"
    async with connected(database_url) as other:
        async with connection.transaction():
            await connection.execute("UPDATE hero SET age = 1 WHERE false")
            waiting = asyncio.create_task(other.execute(lock))
            query = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'relation'"
            await until(lambda: connection.fetchval(query), "the other one waits")
            job_id = await bench.run(request())
            row = await bench.job(job_id)
            assert (row.state, row.reason, row.attempt) == ("queued", "deferred", 0)
            assert row.error == "1 others wait for locks on hero"
        await waiting
    assert await left(connection) == heroes


async def test_it_stops_at_the_end_of_its_window_until_the_time_at_which_it_began(
    bench: Bench, connection: asyncpg.Connection, heroes: list[int]
) -> None:
    """Its window ended a minute before it began: it is open for all but a minute of the day."""
    accepted = await bench.producer.enqueue(request(until=a_time(minutes=-1), batch_rows=5))
    await bench.deliver(accepted.job_id)
    assert await left(connection) == []

    again = await bench.producer.enqueue(request(until=a_time(minutes=1)))
    await connection.execute(
        "INSERT INTO hero (name, deleted_at) VALUES ('Eve', now() - interval '31 days')"
    )
    began = datetime.now(UTC) - timedelta(hours=2)
    await connection.execute(
        "INSERT INTO bulwark.chunk (job_id, chunk_no, claim_id, first_row, rows, filtered,"
        " start_byte, end_byte, first_line, next_line, counts, detail)"
        " VALUES ($1, 0, $1, 1, 0, 0, 0, 0, 1, 1, '{}', jsonb_build_object('began', $2::text,"
        " 'cutoffs', jsonb_build_object('hero', $2::text)))",
        *(again.job_id, began.isoformat()),
    )
    payload = "UPDATE bulwark.job SET payload = payload || $2 WHERE id = $1"
    await connection.execute(payload, again.job_id, f'{{"until": "{a_time(minutes=-2)}"}}')
    await bench.deliver(again.job_id)
    row: Any = await bench.job(again.job_id)
    assert (row.state, row.reason) == ("queued", "deferred")
    assert "its window ended at" in row.error
    in_s = (row.run_at - datetime.now(UTC)).total_seconds()
    assert in_s == pytest.approx(22 * 3600, abs=120)
    assert len(await left(connection)) == 1


def a_time(*, minutes: int) -> str:
    return f"{datetime.now(UTC) + timedelta(minutes=minutes):%H:%M}"


async def test_a_purge_that_is_stopped_after_every_batch_tells_of_each_row_once(
    bench: Bench, connection: asyncpg.Connection, sessions: Sessions, heroes: list[int]
) -> None:
    """Four full batches and an empty one of heroes, one of no team: to remove, and to judge."""
    await connection.execute(
        "INSERT INTO team (name) VALUES ('Red');"
        "INSERT INTO membership (hero_id, team_id, role)"
        " SELECT hero.id, team.id, 'x' FROM hero, team;"
        "CREATE FUNCTION stop() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO bulwark.halt (kind, reason) VALUES ('purge_deleted_rows', 'look')"
        " ON CONFLICT DO NOTHING; RETURN NULL; END $$;"
        "CREATE TRIGGER stop AFTER UPDATE ON bulwark.chunk FOR EACH ROW"
        " WHEN (NEW.chunk_no > 0) EXECUTE FUNCTION stop()"
    )
    retention = {"hero": 30, "team": 30}
    job_id = await bench.run(request(batch_rows=5, retention_days=retention))
    stops = 0
    while (await bench.job(job_id)).state == "queued":
        stops += 1
        await transaction(sessions, lambda s: halt.lift(s, KIND), name="test.lift")
        await bench.deliver(job_id)

    assert stops == 11
    assert (await bench.job(job_id)).state == "succeeded"
    assert await bench.counts(job_id) == {"kept": 20}
    told = [int(one.message.split()[1]) for one in await bench.verdicts(job_id)]
    assert told == heroes
    assert [one.row_no for one in await bench.verdicts(job_id)] == list(range(1, 21))
