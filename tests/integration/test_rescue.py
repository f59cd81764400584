"""What a dead worker held is taken back, its locks first, and a living one is left alone."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from uuid import UUID, uuid4

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from structlog.testing import capture_logs

from db.engine import make_sessions
from db.ledger import cancellation, job, release, ring, worker
from db.ledger.job import Claim, Reason
from db.ledger.limits import BRIEF
from db.transaction import transaction
from jobs._discovery import discover_jobs
from jobs._producer import Producer
from tests.inprocess import Bench
from tests.proxy import proxied
from tests.sample_jobs.act_out import ActOut
from tests.stage import SAMPLE_JOBS, Stage, connected
from tests.workers import Start, environment, until
from worker import rescue as rescue_module
from worker.rescue import Rescue

Sessions = async_sessionmaker[AsyncSession]
LOST_AFTER_S = 0.2


@pytest.fixture
async def stage(stage: Stage) -> Stage:
    """A stage on a server that no longer counts as just started."""

    async def old_enough() -> bool:
        return bool(
            await stage.value(
                "SELECT clock_timestamp() > pg_postmaster_start_time() + interval '0.5 s'"
            )
        )

    await until(old_enough, "the server is no longer young")
    return stage


class Scene:
    """Workers that hold jobs, as they stand in the ledger."""

    def __init__(self, sessions: Sessions, stage: Stage, url: str) -> None:
        self.sessions = sessions
        self.stage = stage
        self.dsn = url.replace("+asyncpg", "")
        self._producer = Producer(sessions, discover_jobs(SAMPLE_JOBS))

    async def worker(self) -> UUID:
        worker_id = uuid4()
        await transaction(
            self.sessions,
            lambda s: worker.register(s, worker_id, "here", 1, ["default"]),
            name="test",
        )
        return worker_id

    async def accept(self) -> UUID:
        return (await self._producer.enqueue(ActOut())).job_id

    async def holder(self) -> Claim:
        """A new worker that has claimed a new job."""
        job_id, worker_id = await self.accept(), await self.worker()
        held = await transaction(
            self.sessions,
            lambda s: job.claim(s, job_id, uuid4(), worker_id),
            name="test",
        )
        assert held is not None
        return held

    async def silence(self, worker_id: UUID) -> None:
        """The worker was last seen a minute ago."""
        await self.stage.value(
            "UPDATE bulwark.worker SET seen_at = now() - interval '1 min' WHERE id = $1", worker_id
        )

    async def connect_as(self, worker_id: UUID) -> asyncpg.Connection:
        name = worker.APPLICATION_NAME.format(worker_id=worker_id)
        return await asyncpg.connect(self.dsn, server_settings={"application_name": name})

    def rescue(self, lost_after_s: float = LOST_AFTER_S) -> Rescue:
        return Rescue(uuid4(), self.sessions, lost_after_s)

    async def end_of(self, worker_id: UUID) -> str | None:
        reason: str | None = await self.stage.value(
            "SELECT end_reason FROM bulwark.worker WHERE id = $1", worker_id
        )
        return reason


@pytest.fixture
def scene(
    sessions: Sessions, stage: Stage, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> Scene:
    """Whose rescuers may stand still for minutes without letting the others beat first."""
    monkeypatch.setattr(rescue_module, "GAP_PART", LOST_AFTER_S / 200)
    return Scene(sessions, stage, database_url)


async def test_a_silent_worker_is_declared_lost_and_its_job_queued_again(scene: Scene) -> None:
    held = await scene.holder()
    await scene.silence(held.worker_id)
    await scene.rescue().look_round()
    assert await scene.end_of(held.worker_id) == "lost"
    assert await scene.stage.ended_as(held.job_id) == ("queued", "rescued", 0)
    assert (await scene.stage.row(held.job_id))["crashes"] == 1


async def test_a_silent_worker_whose_own_transaction_holds_its_row_is_declared_lost_all_the_same(
    scene: Scene,
) -> None:
    """As one that was paused while it claimed more, where no timeout of PostgreSQL's counts."""
    held = await scene.holder()
    await scene.silence(held.worker_id)
    claiming = await scene.connect_as(held.worker_id)
    try:
        await claiming.execute("BEGIN")
        await claiming.fetch(
            "SELECT FROM bulwark.worker WHERE id = $1 FOR KEY SHARE", held.worker_id
        )
        await scene.rescue().look_round()
        assert await scene.end_of(held.worker_id) == "lost"
        assert await scene.stage.ended_as(held.job_id) == ("queued", "rescued", 0)
    finally:
        await claiming.close()


async def test_a_living_worker_whose_transaction_holds_its_row_is_not_disturbed(
    scene: Scene,
) -> None:
    held = await scene.holder()
    await scene.silence(held.worker_id)
    lock = "SELECT FROM bulwark.worker WHERE id = $1 FOR KEY SHARE"
    claiming, beating = await scene.connect_as(held.worker_id), scene.stage
    try:
        await claiming.execute("BEGIN")
        await claiming.fetch(lock, held.worker_id)
        looking = asyncio.create_task(scene.rescue().look_round())

        async def waits() -> bool:
            return bool(
                await beating.value("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
            )

        await until(waits, "the rescuer waits for the worker's row")
        await beating.value(
            "UPDATE bulwark.worker SET seen_at = now() + interval '1 min' WHERE id = $1",
            held.worker_id,
        )
        await looking
        assert await claiming.fetchval("SELECT 1") == 1
        assert await scene.end_of(held.worker_id) is None
        assert (await scene.stage.row(held.job_id))["state"] == "running"
    finally:
        await claiming.close()


async def test_a_worker_that_was_just_seen_keeps_its_job(scene: Scene) -> None:
    held = await scene.holder()
    await scene.stage.value(
        "UPDATE bulwark.worker SET seen_at = now() + interval '1 min' WHERE id = $1",
        held.worker_id,
    )
    await scene.rescue().look_round()
    assert await scene.end_of(held.worker_id) is None
    assert (await scene.stage.row(held.job_id))["state"] == "running"


async def test_nobody_declares_himself_lost(scene: Scene) -> None:
    held = await scene.holder()
    await scene.silence(held.worker_id)
    await Rescue(held.worker_id, scene.sessions, LOST_AFTER_S).look_round()
    assert await scene.end_of(held.worker_id) is None


async def test_several_rescuers_at_once_count_one_crash(scene: Scene) -> None:
    holders = [await scene.holder() for _ in range(3)]
    for held in holders:
        await scene.silence(held.worker_id)
    await asyncio.gather(*(scene.rescue().look_round() for _ in range(4)))
    for held in holders:
        assert (await scene.stage.row(held.job_id))["crashes"] == 1


async def test_the_open_transaction_of_a_lost_worker_is_ended_before_its_job_is_taken(
    scene: Scene,
) -> None:
    held = await scene.holder()
    paused = await scene.connect_as(held.worker_id)
    await paused.execute("BEGIN")
    await paused.execute(
        f"SELECT FROM bulwark.job WHERE claim_id = '{held.claim_id}' FOR SHARE;"
        "INSERT INTO note (text) VALUES ('from the past')"
    )
    await scene.silence(held.worker_id)
    await asyncio.wait_for(scene.rescue().look_round(), 20)
    assert await scene.stage.ended_as(held.job_id) == ("queued", "rescued", 0)
    with pytest.raises((asyncpg.InterfaceError, asyncpg.PostgresError, OSError)):
        await paused.execute("COMMIT")
    assert await scene.stage.notes() == []


async def test_a_lost_worker_that_held_no_job_keeps_no_lock(scene: Scene) -> None:
    worker_id, job_id = await scene.worker(), await scene.accept()
    paused = await scene.connect_as(worker_id)
    await paused.execute("BEGIN")
    await paused.execute(f"SELECT FROM bulwark.job WHERE id = '{job_id}' FOR UPDATE")
    await scene.silence(worker_id)
    await scene.rescue().look_round()
    await scene.stage.value("SET lock_timeout = '1 s'")
    assert await scene.stage.value("SELECT id FROM bulwark.job WHERE id = $1 FOR UPDATE", job_id)
    paused.terminate()


async def test_what_a_rescuer_left_half_done_is_finished_by_another(scene: Scene) -> None:
    held = await scene.holder()
    await scene.stage.value(
        "UPDATE bulwark.worker SET ended_at = now(), end_reason = 'lost' WHERE id = $1",
        held.worker_id,
    )
    await scene.rescue().look_round()
    assert await scene.stage.ended_as(held.job_id) == ("queued", "rescued", 0)


async def test_a_claim_that_a_living_worker_forgot_is_taken_back_without_a_crash(
    scene: Scene,
) -> None:
    held = await scene.holder()
    await scene.stage.value(
        "UPDATE bulwark.worker SET seen_at = now() + interval '1 min',"
        " previous_seen_at = clock_timestamp() WHERE id = $1",
        held.worker_id,
    )
    await scene.rescue().look_round()
    assert await scene.stage.ended_as(held.job_id) == ("queued", "rescued", 0)
    assert (await scene.stage.row(held.job_id))["crashes"] == 0
    assert await scene.end_of(held.worker_id) is None


async def test_nobody_is_declared_lost_soon_after_the_server_started(scene: Scene) -> None:
    held = await scene.holder()
    await scene.stage.value(
        "UPDATE bulwark.worker SET seen_at = now() - interval '1 year' WHERE id = $1",
        held.worker_id,
    )
    await scene.rescue(lost_after_s=30 * 24 * 3600).look_round()
    assert await scene.end_of(held.worker_id) is None


@pytest.mark.parametrize(
    "at", [b"pg_postmaster_start_time", b"seen_at <", b"FOR UPDATE", b"UPDATE b"]
)
async def test_a_rescuer_that_was_away_itself_lets_the_others_beat_first(
    scene: Scene, database_url: str, monkeypatch: pytest.MonkeyPatch, at: bytes
) -> None:
    monkeypatch.undo()  # its gap is as short as ever
    monkeypatch.setattr(rescue_module, "INTERVAL_S", 0.1)
    stall_s = 4 * rescue_module.INTERVAL_S  # a gap is two intervals
    held = await scene.holder()
    await scene.silence(held.worker_id)
    async with proxied(database_url) as (proxy, url):
        engine = create_async_engine(url)
        rescue = Rescue(uuid4(), make_sessions(engine), LOST_AFTER_S)
        proxy.hold(at)
        looking = asyncio.create_task(rescue.look_round())
        await asyncio.wait_for(proxy.holds.wait(), 10)
        stalled_until_s = time.monotonic() + stall_s

        async def stalled_long_enough() -> bool:
            return time.monotonic() > stalled_until_s

        await until(stalled_long_enough, "the stall is longer than a gap")
        proxy.release()
        await looking
        assert await scene.end_of(held.worker_id) is None

        async def rescued() -> bool:
            await rescue.look_round()
            return await scene.end_of(held.worker_id) == "lost"

        await until(rescued, "the quiet is over")
        await engine.dispose()


async def test_a_lost_worker_that_cannot_be_rescued_does_not_stop_the_others(
    scene: Scene,
) -> None:
    locked, lost, other = [await scene.holder() for _ in range(3)]
    for held in (locked, lost, other):
        await scene.silence(held.worker_id)
    stranger = await asyncpg.connect(scene.dsn)
    await stranger.execute("BEGIN")
    await stranger.execute(f"SELECT FROM bulwark.worker WHERE id = '{locked.worker_id}' FOR UPDATE")
    await stranger.execute(f"SELECT FROM bulwark.job WHERE id = '{lost.job_id}' FOR UPDATE")
    rescue = scene.rescue()
    with capture_logs() as logs:
        await asyncio.wait_for(rescue.look_round(), 30)
    not_rescued = [one["worker"] for one in logs if one["event"] == "worker.not_rescued"]
    assert not_rescued == [str(locked.worker_id), str(lost.worker_id)]
    assert await scene.stage.ended_as(other.job_id) == ("queued", "rescued", 0)
    assert (await scene.stage.row(lost.job_id))["state"] == "running"
    await stranger.close()

    async def all_rescued() -> bool:
        await rescue.look_round()
        rows = [await scene.stage.row(one.job_id) for one in (locked, lost)]
        return {row["state"] for row in rows} == {"queued"}

    await until(all_rescued, "the locks are free and both are rescued")


async def test_tidying_forgets_idempotency_keys_that_have_expired(scene: Scene) -> None:
    await scene.stage.value(
        "INSERT INTO bulwark.idempotency VALUES"
        " ('old', gen_random_uuid(), '', now() - interval '1 s'),"
        " ('new', gen_random_uuid(), '', now() + interval '1 h')"
    )
    await scene.rescue().tidy()
    assert await scene.stage.value("SELECT array_agg(key) FROM bulwark.idempotency") == ["new"]


async def test_a_job_that_is_put_off_while_it_is_cancelled_ends_after_the_next_tidying(
    scene: Scene, bench: Bench
) -> None:
    held, put_off = await scene.holder(), await scene.holder()
    an_hour = timedelta(hours=1)
    async with scene.sessions.begin() as cancelling:
        await cancellation.cancel(cancelling, held.job_id, None, at_once=False)
        for one in (held, put_off):
            async with scene.sessions.begin() as session:
                await release.requeue(session, one, Reason.RETRY, delay=an_hour)

    await scene.rescue().tidy()

    async with scene.sessions.begin() as session:
        rings = await ring.due_rings(session, 10)
    await bench.deliver(held.job_id)
    await bench.deliver(put_off.job_id)
    assert [one.job_id for one in rings] == [held.job_id]
    assert (await scene.stage.row(held.job_id))["state"] == "cancelled"
    assert (await scene.stage.row(put_off.job_id))["state"] == "queued"


async def test_tidying_that_is_held_up_delays_no_rescue(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rescue_module, "BRIEF", replace(BRIEF, lock_s=60.0))
    held = await scene.holder()
    async with idempotency_locked(scene):
        running = asyncio.create_task(scene.rescue().run_forever())

        async def tidying_waits() -> bool:
            return bool(
                await scene.stage.value("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
            )

        await until(tidying_waits, "the tidying waits for the lock")
        await scene.silence(held.worker_id)
        await scene.stage.becomes(held.job_id, "queued", within_s=20.0)
        running.cancel()
        await asyncio.wait([running])


async def test_one_kind_of_tidying_that_is_held_up_does_not_stop_the_others(scene: Scene) -> None:
    gone = await scene.worker()
    await scene.stage.value(
        "UPDATE bulwark.worker SET ended_at = now() - interval '8 days', end_reason = 'stopped'"
        " WHERE id = $1",
        gone,
    )
    async with idempotency_locked(scene):
        with capture_logs() as logs:
            await asyncio.wait_for(scene.rescue().tidy(), 20)
    assert [line["what"] for line in logs] == ["idempotency"]
    assert await scene.stage.value("SELECT count(*) FROM bulwark.worker") == 0


@pytest.mark.once
async def test_a_worker_that_stands_still_while_it_tidies_up_lets_others_go_on(
    scene: Scene, start: Start, database_url: str, redis_url: str
) -> None:
    """Long before it is lost: PostgreSQL ends the transaction that it has open."""
    tidying = "SELECT bulwark.ensure_partitions()"
    async with connected(scene.dsn) as stranger:
        await stranger.execute(f"BEGIN; {tidying}")
        process = start(environment(database_url, redis_url))

        async def it_waits() -> bool:
            return bool(
                await scene.stage.value(
                    "SELECT EXISTS (SELECT FROM pg_locks "
                    "WHERE locktype = 'advisory' AND NOT granted)"
                )
            )

        await until(it_waits, "the worker is about to make partitions")
        process.signal(signal.SIGSTOP)
        await stranger.execute("ROLLBACK")
        await until(partial(is_held_by_another, stranger), "the worker has the lock")
        await stranger.execute("SET lock_timeout = '20s'")
        await stranger.execute(tidying)
    process.kill()


async def is_held_by_another(connection: asyncpg.Connection) -> bool:
    held: bool = await connection.fetchval(
        "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted "
        "AND pid <> pg_backend_pid() AND database = "
        "(SELECT oid FROM pg_database WHERE datname = current_database()))"
    )
    return held


@asynccontextmanager
async def idempotency_locked(scene: Scene) -> AsyncIterator[None]:
    async with connected(scene.dsn) as stranger:
        await stranger.execute("BEGIN; LOCK TABLE bulwark.idempotency")
        yield
