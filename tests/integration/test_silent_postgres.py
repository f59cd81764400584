"""A COMMIT that PostgreSQL carries out without a word costs half a minute, and nothing twice.

Both ends of the connection stay open and take everything: only a clock of the worker's own can
tell. Everything that a worker does beside its jobs has that clock, and so has a producer.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest
import sqlalchemy as sa
from arq.connections import ArqRedis
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.engine import PoolProfile, create_engine, make_sessions
from db.ledger import worker
from db.transaction import ANSWER_TIMEOUT_S, transaction
from jobs import Schedule, discover_jobs, job
from jobs._bell import queue_key, serialize
from jobs._discovery import Jobs
from jobs._producer import Producer
from tests.arq_side import hearing
from tests.inprocess import Bench
from tests.proxy import Cut, Proxy, proxied
from tests.sample_jobs.act_out import ActOut
from tests.stage import SAMPLE_JOBS, Stage
from worker.delivery import Delivery
from worker.schedule import Scheduler, plan_schedules
from worker.settings import Settings

Sessions = async_sessionmaker[AsyncSession]
FAR = "far away"
MESSAGE_MS = 1_800_000_000_000
SET_BACK = sa.text(
    "UPDATE bulwark.schedule SET watermark = watermark - interval '1 year' WHERE name = 'fired'"
)


@asynccontextmanager
async def far(database_url: str) -> AsyncIterator[tuple[Proxy, Sessions]]:
    """A proxy, and sessions of a pool that leads through it."""
    async with proxied(database_url) as (proxy, way):
        engine = create_engine(way, profile=PoolProfile.LIGHT, application_name=FAR)
        yield proxy, make_sessions(engine)
        await engine.dispose()


async def watchman(sessions: Sessions, name: str) -> Scheduler:
    """The scheduler of a worker that knows one schedule, of each New Year."""

    @job(schedules=[Schedule(name=name, cron="0 0 1 1 *", missed="once", overlap="queue")])
    async def chime(session: AsyncSession, payload: ActOut) -> None:
        """Never run here."""

    jobs, worker_id = Jobs([chime]), uuid4()
    await transaction(
        sessions, lambda s: worker.register(s, worker_id, "here", 1, ["default"]), name="test"
    )
    return Scheduler(
        worker_id, sessions, Producer(sessions, jobs), plan_schedules(jobs, Settings())
    )


async def declare(database_url: str) -> None:
    async with far(database_url) as (proxy, sessions):
        scheduler = await watchman(sessions, "declared")
        proxy.arm(Cut.SILENCE)
        await scheduler.look_round()
        assert proxy.cuts == [Cut.SILENCE]


async def fire(database_url: str) -> None:
    async with far(database_url) as (proxy, sessions):
        scheduler = await watchman(sessions, "fired")
        await scheduler.look_round()
        async with sessions.begin() as session:
            await session.execute(SET_BACK)
        proxy.arm(Cut.SILENCE)
        await scheduler.look_round()
        assert proxy.cuts == [Cut.SILENCE]


async def take_in(database_url: str, redis_url: str) -> None:
    """Of two messages one is adopted and one parked."""
    async with far(database_url) as (proxy, sessions), hearing(redis_url) as ear:
        bench = Bench(sessions, database_url, discover_jobs(SAMPLE_JOBS))
        delivery = Delivery(await bench.register(), ear)
        messages = await ear.claim(10)
        proxy.arm(Cut.SILENCE, Cut.SILENCE)
        async with asyncio.TaskGroup() as tasks:
            for message in messages:
                tasks.create_task(delivery.carry_out(message))
        assert proxy.cuts == [Cut.SILENCE] * 2


async def enqueue(database_url: str) -> None:
    async with far(database_url) as (proxy, sessions):
        producer = Producer(sessions, discover_jobs(SAMPLE_JOBS))
        proxy.arm(Cut.SILENCE)
        await producer.enqueue(ActOut(), actor="producer")
        assert proxy.cuts == [Cut.SILENCE]


@pytest.mark.once
async def test_what_is_done_beside_jobs_survives_a_commit_that_is_never_answered(
    database_url: str, redis_url: str, client: ArqRedis, stage: Stage
) -> None:
    for kind, arq_id in (("act_out", "known"), ("unheard_of", "strange")):
        content = serialize({"t": None, "f": kind, "a": (), "k": {}, "et": MESSAGE_MS})
        await client.set(f"arq:job:{arq_id}", content)
        await client.zadd(queue_key("default"), {arq_id: 1})

    async with asyncio.timeout(2 * ANSWER_TIMEOUT_S), asyncio.TaskGroup() as tasks:
        tasks.create_task(declare(database_url))
        tasks.create_task(fire(database_url))
        tasks.create_task(take_in(database_url, redis_url))
        tasks.create_task(enqueue(database_url))

    assert await client.keys("*") == []
    assert await stage.rows("SELECT name FROM bulwark.schedule ORDER BY name") == [
        ("declared",),
        ("fired",),
    ]
    fired = "SELECT schedule FROM bulwark.slot WHERE outcome = 'fired'"
    assert await stage.rows(fired) == [("fired",)]
    made = "SELECT coalesce(arq_id, actor), state FROM bulwark.job ORDER BY 1"
    assert await stage.rows(made) == [
        ("known", "succeeded"),
        ("producer", "queued"),
        ("schedule:fired", "queued"),
    ]
    assert await stage.rows("SELECT arq_id FROM bulwark.parked") == [("strange",)]
