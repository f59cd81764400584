"""What SQL enqueues is rung at once where a worker listens, and soon where none does."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import asyncpg
import pytest
from arq.connections import ArqRedis
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from structlog.testing import capture_logs

from db.engine import PoolProfile, create_engine
from tests.own_servers import OwnPostgres, frozen, own_postgres
from tests.stage import Stage, connected
from tests.workers import Start, environment, until
from worker import listening
from worker.listening import Listener
from worker.relay import LEAST_WAIT_S, Relay
from worker.shutdown import cancel_until_done

Sessions = async_sessionmaker[AsyncSession]
FAR_APART_S = 60.0
"""Between two looks of a relay: longer than any test waits."""
ENQUEUE = "SELECT bulwark.enqueue('act_out', '{}')"


class Alarm:
    """Counts how often it was rung."""

    def __init__(self) -> None:
        self.times = 0

    def ring(self) -> None:
        self.times += 1

    async def rings(self, times: int, what: str) -> None:
        async def enough() -> bool:
            return self.times >= times

        await until(enough, what, 20.0)


@asynccontextmanager
async def listening_to(url: str, wake: Callable[[], None]) -> AsyncIterator[None]:
    engine = create_engine(url, profile=PoolProfile.LIGHT, application_name="listen")
    task = asyncio.create_task(Listener(engine, wake).run_forever())
    try:
        yield
    finally:
        await cancel_until_done(task)


async def test_a_commit_from_sql_wakes_once_and_a_rollback_never(
    database_url: str, connection: asyncpg.Connection
) -> None:
    alarm = Alarm()
    async with listening_to(database_url, alarm.ring):
        await alarm.rings(1, "listening has begun")
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(ENQUEUE)
        await transaction.rollback()
        async with connection.transaction():
            for _ in range(100):
                await connection.execute(ENQUEUE)
            await connection.execute(
                "SELECT bulwark.enqueue('act_out', '{}', run_at => now() + interval '1 h')"
            )
        await alarm.rings(2, "the commit has woken it")
        await connection.execute(ENQUEUE)
        await alarm.rings(3, "the next commit has woken it")
    assert alarm.times == 3


async def test_a_job_for_much_later_wakes_nobody(
    database_url: str, connection: asyncpg.Connection
) -> None:
    alarm = Alarm()
    async with listening_to(database_url, alarm.ring):
        await alarm.rings(1, "listening has begun")
        for delay in ("1 hour", "10 s"):
            await connection.execute(
                f"SELECT bulwark.enqueue('act_out', '{{}}', run_at => now() + interval '{delay}')"
            )
        await alarm.rings(2, "the job that is due soon has woken it")
    assert alarm.times == 2


async def test_a_relay_that_is_woken_rings_although_its_next_look_is_far_away(
    database_url: str,
    connection: asyncpg.Connection,
    sessions: Sessions,
    redis: ArqRedis,
) -> None:
    relay = Relay(sessions, redis, ("default",), FAR_APART_S, set())

    async def rung() -> bool:
        return bool(await redis.zcard("arq:queue"))

    task = asyncio.create_task(relay.run_forever())
    try:
        async with listening_to(database_url, relay.wake):
            await connection.execute(ENQUEUE)
            await until(rung, "the job is rung", 10.0)
            await redis.delete("arq:queue")
            await connection.execute(ENQUEUE)
            await until(rung, "the second job is rung", 10.0)
    finally:
        await cancel_until_done(task)


async def test_however_many_commits_wake_it_a_relay_pauses_between_two_looks(
    engine: AsyncEngine, sessions: Sessions, redis: ArqRedis
) -> None:
    looks: list[float] = []
    relay = Relay(sessions, redis, ("default",), FAR_APART_S, set())

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def see(_: Any, __: Any, statement: str, *___: Any) -> None:
        if "min(next_ring_at)" in statement:
            looks.append(time.monotonic())
            relay.wake()

    task = asyncio.create_task(relay.run_forever())

    async def many() -> bool:
        return len(looks) > 20

    try:
        await until(many, "it looks again and again")
    finally:
        await cancel_until_done(task)
    pauses = [later - sooner for sooner, later in pairwise(looks)]
    assert min(pauses) >= LEAST_WAIT_S


async def told(logs: list[Any], event: str, times: int = 1) -> None:
    async def seen() -> bool:
        return [line["event"] for line in logs].count(event) >= times

    await until(seen, f"{event} is told {times} times", 30.0)


async def test_a_connection_that_is_ended_is_replaced_and_told_once(
    database_url: str, connection: asyncpg.Connection
) -> None:
    alarm = Alarm()
    with capture_logs() as logs:
        async with listening_to(database_url, alarm.ring):
            for beginning in (1, 2, 3):
                await alarm.rings(beginning, "listening begins")
                if beginning < 3:
                    assert await connection.fetchval(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE application_name = 'listen' AND datname = current_database()"
                    )
            await connection.execute(ENQUEUE)
            await alarm.rings(4, "it hears again")
    assert [line["event"] for line in logs] == ["listen.failed", "listen.back"] * 2


async def test_while_postgresql_is_away_it_is_told_once_and_afterwards_it_hears_again() -> None:
    alarm = Alarm()
    with own_postgres() as postgres, capture_logs() as logs:
        async with listening_to(postgres.url, alarm.ring):
            await alarm.rings(1, "listening has begun")
            await asyncio.to_thread(postgres.stop, "immediate")
            await told(logs, "listen.failed")
            await asyncio.to_thread(postgres.start)
            await told(logs, "listen.back")
            await notify(postgres)
            await alarm.rings(3, "it hears again")
    assert [line["event"] for line in logs] == ["listen.failed", "listen.back"]


async def test_a_connection_that_dies_in_silence_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listening, "PROBE_INTERVAL_S", 0.1)
    monkeypatch.setattr(listening, "PROBE_TIMEOUT_S", 0.5)
    alarm = Alarm()
    with own_postgres() as postgres, capture_logs() as logs:
        async with listening_to(postgres.url, alarm.ring):
            await alarm.rings(1, "listening has begun")
            with frozen(postgres):
                await told(logs, "listen.failed")
            await told(logs, "listen.back")
            await notify(postgres)
            await alarm.rings(3, "it hears again")


async def notify(postgres: OwnPostgres) -> None:
    async with connected(postgres.url) as connection:
        await connection.execute("NOTIFY bulwark_jobs")


@pytest.mark.parametrize("listens", [True, False])
async def test_a_worker_runs_what_sql_enqueues(
    database_url: str,
    redis_url: str,
    connection: asyncpg.Connection,
    stage: Stage,
    start: Start,
    listens: bool,
) -> None:
    settings = {"listen_url": database_url, "relay_interval_s": "60"} if listens else {}
    worker = start(
        environment(database_url, redis_url, job_modules="tests.sample_jobs.act_out", **settings)
    )

    async def ready() -> bool:
        listeners = await stage.value(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE query ILIKE 'LISTEN%' AND datname = current_database()"
        )
        return bool(await stage.value("SELECT count(*) FROM bulwark.worker")) and (
            bool(listeners) is listens
        )

    await until(ready, "the worker is there")
    for number in range(3):
        job_id = await connection.fetchval(
            "SELECT bulwark.enqueue('act_out', jsonb_build_object('note', $1::text))", str(number)
        )
        await stage.becomes(job_id, "succeeded", 20.0)
    assert await stage.notes() == ["0", "1", "2"]
    assert await stage.value("SELECT max_attempts FROM bulwark.kind WHERE kind = 'act_out'") == 3
    assert worker.terminate() == 0
