"""Every queued job is heard of sooner or later, whatever Redis has lost."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from alembic import command
from alembic.config import Config
from arq.connections import ArqRedis
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from structlog.testing import capture_logs

from db.engine import PoolProfile, create_engine, make_sessions
from db.ledger import acceptance, ring
from jobs._bell import Bell, job_id_of, queue_key
from jobs._discovery import discover_jobs
from jobs._producer import Producer
from tests.inprocess import Bench
from tests.own_servers import OwnPostgres, OwnRedis, own_postgres
from tests.sample_jobs.act_out import GATE, ActOut
from tests.stage import SAMPLE_JOBS, Stage, connected, stage_on
from tests.workers import ROOT, until
from worker import relay as relay_module
from worker.executor import Executor
from worker.mark import MARK_LEASE_S, mark_key
from worker.redis_pool import make_redis
from worker.relay import Relay
from worker.shutdown import cancel_until_done

Sessions = async_sessionmaker[AsyncSession]


@pytest.fixture(autouse=True)
def rung_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No job is rung again by itself: a relay that has not noticed something never does."""
    for module in (ring, acceptance):
        monkeypatch.setattr(module, "RING_AGAIN", timedelta(hours=1))


@pytest.fixture
def rung_again_as_usual(rung_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()


@pytest.fixture
async def redis(valkey: OwnRedis) -> AsyncIterator[ArqRedis]:
    async with make_redis(valkey.url, 5.0) as redis:
        yield redis


@pytest.fixture
def relay(sessions: Sessions, redis: ArqRedis) -> Relay:
    return Relay(sessions, redis, ("default", "bulk"), 0.05, set())


@pytest.fixture
def producer(sessions: Sessions, redis: ArqRedis) -> Producer:
    """Rings what it enqueues."""
    return Producer(sessions, discover_jobs(SAMPLE_JOBS), Bell(redis))


@pytest.fixture
def silent(sessions: Sessions) -> Producer:
    """Has no bell."""
    return Producer(sessions, discover_jobs(SAMPLE_JOBS))


def soon_s() -> float:
    """On the loop's clock."""
    return asyncio.get_running_loop().time() + 2.0


@asynccontextmanager
async def running(relay: Relay) -> AsyncIterator[None]:
    task = asyncio.create_task(relay.run_forever())
    try:
        yield
    finally:
        await cancel_until_done(task)


async def heard(redis: ArqRedis, queue: str = "default") -> list[tuple[UUID, int]]:
    """The rings in a queue: job and number."""
    names = [name.decode() for name in await redis.zrange(queue_key(queue), 0, -1)]
    return [(job_id_of(name), int(name.partition(":")[2])) for name in names]


async def until_heard(redis: ArqRedis, job_id: UUID, queue: str = "default") -> None:
    async def look() -> bool:
        return job_id in {one for one, _ in await heard(redis, queue)}

    await until(look, "the job is rung")


async def until_rung(redis: ArqRedis, job_id: UUID, number: int) -> None:
    async def look() -> bool:
        return (job_id, number) in await heard(redis)

    await until(look, f"the job is rung {number} times")


async def until_marked(redis: ArqRedis) -> None:
    """Return once the mark is there to stay."""

    async def marked() -> bool:
        return bool(await redis.ttl(await mark_key(redis)) > MARK_LEASE_S)

    await until(marked, "a relay has left its mark")


async def no_transaction_is_open(stage: Stage) -> bool:
    sql = (
        "SELECT count(*) = 1 FROM pg_stat_activity "
        "WHERE datname = current_database() AND xact_start IS NOT NULL"
    )
    return bool(await stage.value(sql))


async def seconds_to_next_ring(stage: Stage, job_id: UUID) -> float:
    wait_s: float = await stage.value(
        "SELECT extract(epoch FROM next_ring_at - now())::float FROM bulwark.job WHERE id = $1",
        job_id,
    )
    return wait_s


async def test_a_ring_that_was_lost_is_rung_again_under_a_new_number(
    stage: Stage, producer: Producer, relay: Relay, redis: ArqRedis
) -> None:
    job_id = (await producer.enqueue(ActOut())).job_id
    assert await heard(redis) == [(job_id, 1)]
    await redis.zrem(queue_key("default"), f"{job_id}:1")
    await stage.make_due(job_id)
    await relay.ring_due()
    assert await heard(redis) == [(job_id, 2)]
    assert await redis.exists(f"arq:job:{job_id}:1") == 0
    assert await redis.exists(f"arq:job:{job_id}:2") == 1


@pytest.mark.usefixtures("rung_again_as_usual")
async def test_a_job_that_was_just_rung_is_left_in_peace(
    stage: Stage, producer: Producer, relay: Relay
) -> None:
    job_id = (await producer.enqueue(ActOut())).job_id
    assert await relay.ring_due() == []
    assert await seconds_to_next_ring(stage, job_id) == pytest.approx(10, abs=5)


@pytest.mark.usefixtures("rung_again_as_usual")
@pytest.mark.parametrize(("age", "wait_s"), [("1 s", 10), ("60 s", 60), ("2 h", 300)])
async def test_a_job_that_nobody_takes_is_rung_less_and_less_often(
    stage: Stage, silent: Producer, relay: Relay, age: str, wait_s: float
) -> None:
    job_id = (await silent.enqueue(ActOut())).job_id
    await stage.value(
        f"UPDATE bulwark.job SET queued_at = now() - interval '{age}' WHERE id = $1", job_id
    )
    await relay.ring_due()
    assert await seconds_to_next_ring(stage, job_id) == pytest.approx(wait_s, abs=5)


async def test_any_number_of_jobs_is_made_due_again_at_once(
    stage: Stage, sessions: Sessions, producer: Producer
) -> None:
    """More than a statement may have parameters."""
    job_id = (await producer.enqueue(ActOut())).job_id
    assert await seconds_to_next_ring(stage, job_id) > 0
    async with sessions.begin() as session:
        await ring.ring_again(session, [*(uuid4() for _ in range(40_000)), job_id])
    assert await seconds_to_next_ring(stage, job_id) <= 0


async def test_a_job_enqueued_without_a_bell_is_rung_in_its_own_queue(
    silent: Producer, relay: Relay, redis: ArqRedis
) -> None:
    async with running(relay):
        job_id = (await silent.enqueue(ActOut(), queue="bulk")).job_id
        await until_heard(redis, job_id, "bulk")
    assert await heard(redis) == []


async def test_a_job_for_later_is_rung_when_it_is_due_and_not_before(
    stage: Stage, producer: Producer, relay: Relay, redis: ArqRedis
) -> None:
    async with running(relay):
        due = datetime.now(UTC) + timedelta(seconds=1)
        job_id = (await producer.enqueue(ActOut(), run_at=due)).job_id
        far = (await producer.enqueue(ActOut(), run_at=due + timedelta(hours=1))).job_id
        assert await heard(redis) == [] or await stage.value("SELECT clock_timestamp() >= $1", due)
        await until_heard(redis, job_id)
        assert await stage.value("SELECT clock_timestamp() >= $1", due)
    assert [one for one, _ in await heard(redis)] == [job_id]
    assert await seconds_to_next_ring(stage, far) > 3000


async def test_an_emptied_redis_is_noticed_and_every_queued_job_rung_again(
    producer: Producer, relay: Relay, redis: ArqRedis
) -> None:
    due, later = ActOut(), datetime.now(UTC) + timedelta(hours=1)
    async with running(relay):
        ids = {(await producer.enqueue(due)).job_id for _ in range(3)}
        await producer.enqueue(due, run_at=later)
        await until_marked(redis)
        await redis.flushall()
        for job_id in ids:
            await until_heard(redis, job_id)
    assert {one for one, _ in await heard(redis)} == ids


async def test_a_redis_that_was_emptied_again_is_noticed_again(
    producer: Producer, relay: Relay, redis: ArqRedis
) -> None:
    async with running(relay):
        job_id = (await producer.enqueue(ActOut())).job_id
        for _ in range(3):
            await until_marked(redis)
            await redis.flushall()
            await until_heard(redis, job_id)


async def rung_long_ago(stage: Stage, producer: Producer, number: int) -> set[UUID]:
    """Jobs that will not be rung again soon, since they have been waiting for long."""
    ids = {(await producer.enqueue(ActOut())).job_id for _ in range(number)}
    await stage.value("UPDATE bulwark.job SET next_ring_at = now() + interval '5 min'")
    return ids


async def test_a_relay_that_finds_a_new_redis_at_its_start_rings_every_queued_job_again(
    stage: Stage, producer: Producer, relay: Relay, redis: ArqRedis
) -> None:
    ids = await rung_long_ago(stage, producer, 3)
    await redis.flushall()
    async with running(relay):
        for job_id in ids:
            await until_heard(redis, job_id)


async def test_a_relay_that_starts_beside_others_leaves_their_rings_alone(
    stage: Stage,
    sessions: Sessions,
    producer: Producer,
    silent: Producer,
    relay: Relay,
    redis: ArqRedis,
) -> None:
    async with running(relay):
        await until_marked(redis)
        ids = await rung_long_ago(stage, producer, 3)
        async with running(Relay(sessions, redis, ("default",), 0.05, set())):
            fresh = (await silent.enqueue(ActOut())).job_id
            await until_heard(redis, fresh)
    assert sorted(await heard(redis)) == sorted((one, 1) for one in {fresh, *ids})


async def test_of_several_relays_that_find_a_new_redis_one_has_all_rung_again(
    stage: Stage, sessions: Sessions, producer: Producer, redis: ArqRedis
) -> None:
    ids = await rung_long_ago(stage, producer, 20)
    await redis.flushall()
    with capture_logs() as logs:
        async with AsyncExitStack() as all_of_them:
            for _ in range(4):
                one = Relay(sessions, redis, ("default",), 0.05, set())
                await all_of_them.enter_async_context(running(one))
            await until_marked(redis)
            for job_id in ids:
                await until_heard(redis, job_id)
    assert [line["event"] for line in logs].count("relay.rings_lost") == 1
    assert sorted(await heard(redis)) == sorted((job_id, 2) for job_id in ids)


async def test_what_a_relay_that_died_owed_to_a_new_redis_is_done_by_another(
    stage: Stage, producer: Producer, relay: Relay, redis: ArqRedis
) -> None:
    (job_id,) = await rung_long_ago(stage, producer, 1)
    await redis.flushall()
    await redis.set(await mark_key(redis), b"", px=100)
    async with running(relay):
        await until_heard(redis, job_id)
        await until_marked(redis)


async def close_gate_before(stage: Stage, job_id: UUID) -> None:
    """Who makes the job due waits until the gate is open."""
    await stage.value(
        f"""CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql
            AS $$ BEGIN PERFORM pg_advisory_xact_lock_shared({GATE}); RETURN NEW; END $$"""
    )
    await stage.value(
        f"""CREATE TRIGGER gate BEFORE UPDATE OF next_ring_at ON bulwark.job
            FOR EACH ROW WHEN (NEW.id = '{job_id}') EXECUTE FUNCTION wait_at_gate()"""
    )
    await stage.close_gate()


@asynccontextmanager
async def held_up_in_the_backlog(
    stage: Stage, relay: Relay, redis: ArqRedis, backlog: list[UUID]
) -> AsyncIterator[None]:
    """The relay runs, and waits in the midst of its second page."""
    await close_gate_before(stage, backlog[3])
    async with running(relay):
        await stage.somebody_at_gate()
        try:
            yield
        finally:
            await stage.open_gate()
        await until_marked(redis)


@pytest.fixture
async def backlog(
    monkeypatch: pytest.MonkeyPatch, stage: Stage, producer: Producer, redis: ArqRedis
) -> list[UUID]:
    """Jobs of four pages and a half whose rings were lost with Redis, in the order of their ids."""
    monkeypatch.setattr(relay_module, "PAGE", 2)
    ids = await rung_long_ago(stage, producer, 9)
    await redis.flushall()
    return sorted(ids)


async def test_a_backlog_whose_rings_were_lost_is_rung_page_by_page_and_what_is_due_goes_before(
    stage: Stage, silent: Producer, relay: Relay, redis: ArqRedis, backlog: list[UUID]
) -> None:
    fresh = (await silent.enqueue(ActOut())).job_id
    with capture_logs() as logs:
        async with held_up_in_the_backlog(stage, relay, redis, backlog):
            before = await heard(redis)
    assert sorted(before) == sorted([(fresh, 1), *((one, 2) for one in backlog[:2])])
    assert {one for one, _ in await heard(redis)} == {fresh, *backlog}
    assert [number for one, number in await heard(redis) if one in backlog] == [2] * 9
    assert [line["jobs"] for line in logs if line["event"] == "relay.rings_lost"] == [10]


@pytest.mark.parametrize("another_dies", [False, True], ids=["alone", "after another that dies"])
async def test_a_redis_that_is_emptied_while_a_backlog_is_rung_has_all_rung_once_more(
    stage: Stage,
    relay: Relay,
    redis: ArqRedis,
    backlog: list[UUID],
    another_dies: bool,
) -> None:
    async with held_up_in_the_backlog(stage, relay, redis, backlog):
        await redis.flushall()
        if another_dies:
            await redis.set(await mark_key(redis), b"another", px=1500)
    assert {one for one, _ in await heard(redis)} == {*backlog}


async def test_a_job_that_somebody_has_locked_holds_up_no_other_of_the_backlog(
    database_url: str, silent: Producer, relay: Relay, redis: ArqRedis, backlog: list[UUID]
) -> None:
    fresh = (await silent.enqueue(ActOut())).job_id
    async with connected(database_url) as other, other.transaction():
        await other.execute("SELECT FROM bulwark.job WHERE id = $1 FOR UPDATE", backlog[3])
        async with running(relay):
            await until_marked(redis)
    assert {one for one, _ in await heard(redis)} == {fresh, *backlog} - {backlog[3]}


async def test_what_a_relay_that_died_in_a_backlog_has_not_rung_is_left_to_the_next(
    stage: Stage, sessions: Sessions, relay: Relay, redis: ArqRedis, backlog: list[UUID]
) -> None:
    await close_gate_before(stage, backlog[3])
    async with running(relay):
        await stage.somebody_at_gate()
    await stage.open_gate()
    await until(lambda: no_transaction_is_open(stage), "its last statement has ended, too")
    assert 0 < await redis.ttl(await mark_key(redis)) <= MARK_LEASE_S
    await redis.pexpire(await mark_key(redis), 1)
    async with running(Relay(sessions, redis, ("default",), 0.05, set())):
        await until_marked(redis)
    assert {one for one, _ in await heard(redis)} == {*backlog}


async def test_a_redis_that_stopped_and_came_back_empty_is_rung_again(
    producer: Producer, relay: Relay, redis: ArqRedis, valkey: OwnRedis
) -> None:
    with capture_logs() as logs:
        async with running(relay):
            job_id = (await producer.enqueue(ActOut())).job_id
            await until_marked(redis)
            await asyncio.to_thread(valkey.stop)

            async def failed() -> bool:
                return any(line["event"] == "relay.failed" for line in logs)

            await until(failed, "the relay says that Redis is away")
            await asyncio.to_thread(valkey.start)
            await until_heard(redis, job_id)


async def test_a_ring_that_redis_did_not_take_is_rung_when_it_is_back(
    stage: Stage, silent: Producer, relay: Relay, redis: ArqRedis, valkey: OwnRedis
) -> None:
    await asyncio.to_thread(valkey.stop)
    async with running(relay):
        job_id = (await silent.enqueue(ActOut())).job_id
        await asyncio.to_thread(valkey.start)
        await until_heard(redis, job_id)


async def test_rings_that_a_full_redis_refused_are_rung_once_it_takes_them(
    stage: Stage, silent: Producer, relay: Relay, redis: ArqRedis
) -> None:
    async with running(relay):
        await until_marked(redis)
        await redis.config_set("maxmemory", 1)
        job_id = (await silent.enqueue(ActOut())).job_id

        async def refused() -> bool:
            return bool((await stage.row(job_id))["ring"] > 0)

        await until(refused, "the relay has tried to ring")
        await redis.config_set("maxmemory", 0)
        await until_heard(redis, job_id)


async def test_a_redis_that_refuses_again_and_again_is_told_once(
    silent: Producer, relay: Relay, redis: ArqRedis
) -> None:
    async def refused_often() -> bool:
        refusals = (await redis.info("errorstats")).get("errorstat_OOM", {"count": 0})
        return bool(refusals["count"] >= 3)

    async def back() -> bool:
        return any(line["event"] == "relay.back" for line in logs)

    with capture_logs() as logs:
        async with running(relay):
            await until_marked(redis)
            await redis.config_set("maxmemory", 1)
            await silent.enqueue(ActOut())
            await until(refused_often, "Redis has refused three times")
            await redis.config_set("maxmemory", 0)
            await until(back, "the relay says that Redis is back")
    told = [line["event"] for line in logs]
    assert (told.count("relay.failed"), told.count("relay.back")) == (1, 1)


async def test_after_a_mere_error_of_redis_only_the_rings_that_it_refused_are_rung_again(
    stage: Stage, producer: Producer, silent: Producer, relay: Relay, redis: ArqRedis
) -> None:
    with capture_logs() as logs:
        async with running(relay):
            await until_marked(redis)
            heard_already = (await producer.enqueue(ActOut())).job_id
            await redis.config_set("maxmemory", 1)
            refused = (await silent.enqueue(ActOut())).job_id

            async def failed() -> bool:
                return any(line["event"] == "relay.failed" for line in logs)

            await until(failed, "Redis has refused the ring")
            await redis.config_set("maxmemory", 0)
            await until_heard(redis, refused)
    assert sorted(await heard(redis)) == sorted([(heard_already, 1), (refused, 1)])
    assert (await stage.row(heard_already))["ring"] == 1
    assert "relay.rings_lost" not in {line["event"] for line in logs}


async def test_several_relays_at_once_ring_each_job_once(
    sessions: Sessions, silent: Producer, redis: ArqRedis
) -> None:
    accepted = await silent.enqueue_many([ActOut() for _ in range(40)])
    relays = [Relay(sessions, redis, ("default",), 1.0, set()) for _ in range(4)]
    rung = await asyncio.gather(*(one.ring_due() for one in relays))
    numbers = [(ring.job_id, ring.number) for rings in rung for ring in rings]
    assert sorted(numbers) == sorted((one.job_id, 1) for one in accepted)


async def test_rings_of_jobs_that_have_ended_are_swept_out(
    stage: Stage,
    producer: Producer,
    relay: Relay,
    redis: ArqRedis,
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(relay_module, "SWEEP_INTERVAL_S", 0.0)
    await redis.set(await mark_key(redis), b"")
    ended, waiting = [(await producer.enqueue(ActOut())).job_id for _ in range(2)]
    await (await bench.register()).deliver(ended)
    await redis.zadd(queue_key("default"), {"a message of somebody else": 1})
    async with running(relay):

        async def swept() -> Any:
            return await redis.zrange(queue_key("default"), 0, -1) == [
                b"a message of somebody else",
                f"{waiting}:1".encode(),
            ]

        await until(swept, "only the ring of the ended job is gone")
    assert await redis.exists(f"arq:job:{ended}:1") == 0


@pytest.fixture
async def away() -> AsyncIterator[tuple[OwnPostgres, Bench]]:
    """A PostgreSQL of the test's own that can be stopped, and a bench on it."""
    with own_postgres() as postgres:
        config = Config(ROOT / "alembic.ini")
        config.attributes["database_url"] = postgres.url
        await asyncio.to_thread(command.upgrade, config, "head")
        engine = create_engine(
            postgres.url, profile=PoolProfile.LIGHT, application_name="test_relay"
        )
        bench = Bench(make_sessions(engine), postgres.url, discover_jobs(SAMPLE_JOBS))
        yield postgres, bench
        await engine.dispose()


async def heard_in_vain(postgres: OwnPostgres, bench: Bench) -> tuple[Executor, UUID]:
    """A job that is not rung again soon, and an executor that could not claim it."""
    executor = await bench.register()
    job_id = (await bench.producer.enqueue(ActOut())).job_id
    async with stage_on(postgres.url) as stage:
        await stage.value("UPDATE bulwark.job SET next_ring_at = now() + interval '5 min'")
    await asyncio.to_thread(postgres.stop)
    await executor.deliver(job_id)
    return executor, job_id


async def test_a_ring_heard_while_postgresql_is_away_is_rung_again_when_it_is_back(
    away: tuple[OwnPostgres, Bench], redis: ArqRedis
) -> None:
    postgres, bench = away
    await redis.set(await mark_key(redis), b"")
    executor, job_id = await heard_in_vain(postgres, bench)
    relay = Relay(bench.sessions, redis, ("default",), 0.05, executor.unclaimed)
    async with running(relay):
        await asyncio.to_thread(postgres.start)
        await until_heard(redis, job_id)
    assert executor.unclaimed == set()
    row = await bench.job(job_id)
    assert (row.state, row.attempt, row.crashes) == ("queued", 0, 0)


async def test_a_ring_heard_in_vain_by_a_worker_that_stops_is_rung_again_by_another(
    away: tuple[OwnPostgres, Bench], redis: ArqRedis
) -> None:
    postgres, bench = away
    await redis.set(await mark_key(redis), b"")
    executor, job_id = await heard_in_vain(postgres, bench)
    await Relay(bench.sessions, redis, ("default",), 0.05, executor.unclaimed).hand_over(soon_s())
    await asyncio.to_thread(postgres.start)
    async with running(Relay(bench.sessions, redis, ("default",), 0.05, set())):
        await until_heard(redis, job_id)


async def test_a_worker_stops_in_peace_while_the_redis_is_away_that_it_owes_all_rings(
    sessions: Sessions, redis: ArqRedis, valkey: OwnRedis
) -> None:
    relay = Relay(sessions, redis, ("default",), 0.05, set())
    await relay._notice_new_redis()
    await asyncio.to_thread(valkey.stop)
    await relay.hand_over(soon_s())
    await asyncio.to_thread(valkey.start)
    assert not await redis.exists(await mark_key(redis))


async def test_a_ring_that_comes_to_a_worker_that_stops_is_left_to_the_others(
    stage: Stage,
    bench: Bench,
    producer: Producer,
    redis: ArqRedis,
    relay: Relay,
    sessions: Sessions,
) -> None:
    async with running(relay):
        await until_marked(redis)
        (job_id,) = await rung_long_ago(stage, producer, 1)
        executor = await bench.register()
        executor.stop()
        await executor.deliver(job_id)
        await Relay(sessions, redis, ("default",), 0.05, executor.unclaimed).hand_over(soon_s())
        await until_rung(redis, job_id, 2)
    assert await redis.exists(await mark_key(redis))


async def test_a_queue_of_a_wrong_type_holds_up_no_other(
    silent: Producer, relay: Relay, redis: ArqRedis
) -> None:
    await redis.set(queue_key("bulk"), b"a string")
    await silent.enqueue(ActOut(), queue="bulk")
    with capture_logs() as events:
        async with running(relay):
            first = (await silent.enqueue(ActOut())).job_id
            await until_heard(redis, first)
            second = (await silent.enqueue(ActOut())).job_id
            await until_heard(redis, second)
            await redis.delete(queue_key("bulk"))
            await silent.enqueue(ActOut(), queue="bulk")
            await until(lambda: _told(events, "relay.back"), "the queue is rung again")
    lost = [one for one in events if one["event"] == "relay.failed"]
    assert [(one["queue"], one["server"]) for one in lost] == [("bulk", "redis")]


async def _told(events: list[Any], event: str) -> bool:
    return any(one["event"] == event for one in events)
