"""An import that fails for good says of every row of its input what became of it."""

import asyncio
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
from sqlalchemy.ext.asyncio import create_async_engine
from structlog.testing import capture_logs

from db.engine import make_sessions
from jobs.insert_rows import InsertRows
from tests.inprocess import BOMB, Bench
from tests.proxy import COMMIT, Road, proxied
from tests.sample_jobs.act_out import GATE
from tests.stage import Stage, waiting_for_a_lock
from tests.workers import Start, environment, until

QUICK = {"beat_interval_s": "0.3", "lost_after_s": "1.0", "relay_interval_s": "0.1"}
GATED_CLOSING = (
    f"""CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql
        AS $$ BEGIN PERFORM pg_advisory_xact_lock_shared({GATE}); RETURN NEW; END $$""",
    """CREATE TRIGGER gate BEFORE INSERT ON bulwark.chunk FOR EACH ROW
        WHEN (NEW.rows > 2) EXECUTE FUNCTION wait_at_gate()""",
)
"""What closes is larger than the chunks of two rows before it."""
GATED_ROW = (
    GATED_CLOSING[0],
    """CREATE TRIGGER gate BEFORE INSERT ON team FOR EACH ROW
        WHEN (NEW.name = 'team 0') EXECUTE FUNCTION wait_at_gate()""",
)


async def test_rows_behind_the_last_chunk_of_a_failed_import_are_counted_as_not_reached(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await connection.execute(BOMB)
    names = ["one", "two", "three", "bomb", "five"]
    payload = InsertRows(table="team", rows=[{"name": name} for name in names], chunk_rows=2)

    executor = await bench.register()
    job_id = (await bench.producer.enqueue(payload, attempts=1)).job_id
    await executor.deliver(job_id)

    done = await bench.job(job_id)
    assert (done.state, done.reason) == ("failed", "attempts_exhausted")
    assert "the disk is gone" in str(done.error)
    counted = await bench.tally(job_id)
    assert counted.counts == {"inserted": 2, "not_reached": 3}
    assert counted.rows == len(names)
    assert await connection.fetchval("SELECT count(*) FROM team") == 2


async def test_a_reject_that_is_gone_at_the_second_look_leaves_no_row_out(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    """The row in the way is deleted by another transaction while the chunk is being cut short."""
    await connection.execute("INSERT INTO team (name) VALUES ('dup')")
    await connection.execute(
        """
        CREATE SEQUENCE looks;
        CREATE FUNCTION vanish() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            -- the second insert of 'a' is that of the second pass over the chunk
            IF NEW.name = 'a' AND nextval('looks') = 2 THEN
                DELETE FROM team WHERE name = 'dup';
            END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER vanish AFTER INSERT ON team FOR EACH ROW EXECUTE FUNCTION vanish();
        """
    )
    names = ["a", "dup", "b", "c", "d"]
    payload = InsertRows(
        table="team", rows=[{"name": name} for name in names], chunk_rows=4, max_rejects=0
    )
    job_id = await bench.run(payload)
    counted = await bench.tally(job_id)
    done = await bench.job(job_id)
    assert sum(counted.counts.values()) == len(names)
    assert (done.state == "succeeded") == ("not_reached" not in counted.counts)


async def test_a_job_that_fails_at_its_last_row_reaches_the_end_of_its_input(
    bench: Bench, tmp_path: Path
) -> None:
    path = tmp_path / "teams.csv"
    path.write_text("name\nRed\nRed\n\n\n")
    job_id = await bench.run_file(path, "spooled", table="team", on_invalid="abort")
    counted = await bench.tally(job_id)
    assert counted.counts == {"inserted": 1, "rejected": 1}
    assert counted.bytes == path.stat().st_size


async def test_a_worker_that_stops_while_it_counts_the_rest_leaves_the_failure_to_the_next_run(
    bench: Bench, stage: Stage
) -> None:
    names = ["Red", "Red", "Blue", "Green", "White"]
    payload = InsertRows(
        table="team", rows=[{"name": name} for name in names], chunk_rows=2, on_invalid="abort"
    )
    for statement in GATED_CLOSING:
        await stage.value(statement)
    await stage.close_gate()
    executor, job_id = await bench.register(), (await bench.producer.enqueue(payload)).job_id
    delivery = asyncio.create_task(executor.deliver(job_id))
    await stage.somebody_at_gate()
    executor.stop()
    await asyncio.wait([delivery])
    await executor.settle()
    assert await stage.ended_as(job_id) == ("queued", "given_back", 0)
    await stage.open_gate()
    bench.worker_id = uuid4()
    await bench.deliver(job_id)
    assert await stage.ended_as(job_id) == ("failed", "rejected", 1)
    assert await bench.counts(job_id) == {"inserted": 1, "rejected": 1, "not_reached": 3}


async def test_an_import_that_was_given_up_does_not_succeed_at_the_next_run(
    bench: Bench,
    stage: Stage,
    connection: asyncpg.Connection,
    start: Start,
    database_url: str,
    redis_url: str,
) -> None:
    """The worker dies when the rest is counted and the job's end is not written yet."""
    await connection.execute(BOMB)
    for statement in GATED_CLOSING:
        await stage.value(statement)
    await stage.close_gate()
    rows: list[dict[str, Any]] = [{"name": name} for name in ("bomb", "two", "three")]
    payload = InsertRows(table="team", rows=rows, chunk_rows=2)
    job_id = (await bench.producer.enqueue(payload, attempts=1)).job_id
    worker = start(environment(database_url, redis_url, **QUICK))
    await stage.somebody_at_gate()
    lock = connection.transaction()
    await lock.start()
    await connection.execute("SELECT FROM bulwark.job WHERE id = $1 FOR SHARE", job_id)
    await stage.open_gate()
    await until(lambda: waiting_for_a_lock(bench.sessions), "the job's end waits")
    worker.kill()
    await lock.rollback()
    await connection.execute("DROP TRIGGER explode ON team")
    start(environment(database_url, redis_url, **QUICK))
    ended = await stage.becomes(job_id, "failed")
    assert (ended["reason"], ended["attempt"]) == ("rejected", 1)
    assert await bench.counts(job_id) == {"not_reached": 3}


async def test_the_rest_is_counted_though_postgresql_was_away_when_the_job_had_failed(
    database_url: str, bench: Bench, stage: Stage
) -> None:
    road = Road(database_url)
    await road.open()
    engine = create_async_engine(road.url)
    away = Bench(make_sessions(engine), database_url)
    names = ["Red", "Red", "Blue", "Green", "White"]
    rows: list[dict[str, Any]] = [{"name": name} for name in names]
    for statement in GATED_CLOSING:
        await stage.value(statement)
    await stage.close_gate()
    payload = InsertRows(table="team", rows=rows, chunk_rows=2, on_invalid="abort")
    job_id = (await bench.producer.enqueue(payload)).job_id
    executor = await away.register()
    with capture_logs() as logs:
        delivery = asyncio.create_task(executor.deliver(job_id))
        await stage.somebody_at_gate()
        await road.close()

        async def waits() -> bool:
            return any(one["event"] == "job.closing_waits" for one in logs)

        await until(waits, "the worker has used up its tries")
    await road.open()
    await stage.open_gate()
    await delivery
    await road.close()
    await engine.dispose()

    assert await stage.ended_as(job_id) == ("failed", "rejected", 1)
    assert await bench.counts(job_id) == {"inserted": 1, "rejected": 1, "not_reached": 3}


async def test_a_chunk_whose_commit_was_still_under_way_is_counted_once_and_the_rest_behind_it(
    database_url: str, bench: Bench, stage: Stage
) -> None:
    """The job is cancelled when its COMMIT is on the way."""
    async with proxied(database_url) as (proxy, way):
        engine = create_async_engine(way)
        executor = await Bench(make_sessions(engine), database_url).register()
        rows: list[dict[str, Any]] = [{"name": f"team {number}"} for number in range(6)]
        for statement in GATED_ROW:
            await stage.value(statement)
        await stage.close_gate()
        payload = InsertRows(table="team", rows=rows, chunk_rows=2)
        job_id = (await bench.producer.enqueue(payload)).job_id
        delivery = asyncio.create_task(executor.deliver(job_id))
        await stage.somebody_at_gate()
        proxy.hold(COMMIT)
        await stage.open_gate()
        await proxy.holds.wait()
        executor.running.stop(executor.running.claims[0])
        await until(lambda: waits_for_a_receipt(stage), "closing waits for the chunk")
        proxy.release()
        await delivery
        await engine.dispose()

    assert await stage.ended_as(job_id) == ("cancelled", None, 0)
    assert await bench.counts(job_id) == {"inserted": 2, "not_reached": 4}
    assert (await bench.report(job_id)).adds_up


async def waits_for_a_receipt(stage: Stage) -> bool:
    """Whether an insert of a receipt waits for another transaction with the same."""
    return bool(
        await stage.value(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND wait_event_type = 'Lock' AND query LIKE 'INSERT INTO bulwark.chunk%'"
        )
    )
