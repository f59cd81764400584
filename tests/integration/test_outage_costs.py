"""What an outage of PostgreSQL costs a job."""

import asyncpg

from jobs.insert_rows import InsertRows
from tests.inprocess import Bench

GONE = """
    CREATE FUNCTION go_away() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN RAISE EXCEPTION 'no room for another connection' USING ERRCODE = '53300'; END $$;
    CREATE TRIGGER go_away BEFORE INSERT ON team FOR EACH ROW EXECUTE FUNCTION go_away();
"""


async def test_an_outage_costs_no_attempt_until_the_job_is_too_old_for_that(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await connection.execute(GONE)
    executor = await bench.register()
    payload = InsertRows(table="team", rows=[{"name": "Red"}])
    job_id = (await bench.producer.enqueue(payload, attempts=1)).job_id

    await executor.deliver(job_id)
    done = await bench.job(job_id)
    assert (done.state, done.reason, done.attempt) == ("queued", "retry", 0)
    assert done.run_at > done.queued_at

    await connection.execute(
        "UPDATE bulwark.job SET run_at = now(), started_at = now() - interval '2 days'"
    )
    await executor.deliver(job_id)
    done = await bench.job(job_id)
    assert (done.state, done.reason) == ("failed", "attempts_exhausted")
