"""What an outage of PostgreSQL costs a job."""

import asyncio

import asyncpg
import pytest

from db.engine import PoolProfile, create_engine, make_sessions
from jobs import Payload, discover_jobs
from jobs.insert_rows import InsertRows
from tests.inprocess import Bench
from tests.proxy import Cut, proxied
from tests.sample_jobs.act_out import ActOut
from tests.sample_jobs.write_notes import WriteNotes
from tests.stage import SAMPLE_JOBS, Stage

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


@pytest.mark.parametrize("payload", [WriteNotes(chunks=1, gate_in=1), ActOut(gate=True)])
async def test_an_outage_that_meets_every_commit_costs_no_attempt(
    stage: Stage, database_url: str, payload: Payload
) -> None:
    """Each COMMIT is on its way when the connection breaks, until the job gives up for a while."""
    await stage.close_gate()
    async with proxied(database_url) as (proxy, way):
        engine = create_engine(way, profile=PoolProfile.LIGHT, application_name="far")
        far = Bench(make_sessions(engine), way, discover_jobs(SAMPLE_JOBS))
        job_id = (await far.producer.enqueue(payload, attempts=1)).job_id
        delivery = asyncio.create_task(far.deliver(job_id))
        await stage.somebody_at_gate()
        proxy.arm(*[Cut.QUESTION] * 5)
        await stage.open_gate()
        await delivery
        assert await stage.ended_as(job_id) == ("queued", "retry", 0)
        await stage.value("UPDATE bulwark.job SET run_at = now()")
        await far.deliver(job_id)
        await engine.dispose()
    assert await stage.ended_as(job_id) == ("succeeded", None, 0)
    assert len(await stage.notes()) == 1
