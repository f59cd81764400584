"""Whatever strikes a transaction, its work is applied once or not at all, and the caller knows."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from structlog.testing import capture_logs

from db.engine import PoolProfile, create_engine, make_sessions, pool_status
from db.errors import AlreadyCommitted, CommitUnknown, NestedTransaction, Race
from db.models.team import Team
from db.retry import Budget, Fault, sqlstate
from db.transaction import transaction
from tests.own_servers import OwnPostgres, own_postgres
from tests.proxy import Cut, Proxy, proxied
from tests.stage import connected

Sessions = async_sessionmaker[AsyncSession]
Event = MutableMapping[str, Any]

TABLES = """
CREATE TABLE effect (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, note text NOT NULL);
CREATE TABLE receipt (key text PRIMARY KEY);
CREATE TABLE counter (id int PRIMARY KEY, value int NOT NULL);
INSERT INTO counter VALUES (1, 0), (2, 0);
"""
ADD_EFFECT = text("INSERT INTO effect (note) VALUES (:note)")
COUNT_EFFECTS = text("SELECT count(*) FROM effect")
ADD_RECEIPT = text("INSERT INTO receipt VALUES (:key) ON CONFLICT DO NOTHING RETURNING key")
INCREMENT = text("UPDATE counter SET value = value + 1 WHERE id = :id")
MY_PID = text("SELECT pg_backend_pid()")
DEADLINE_S = 30.0


@dataclass
class Work:
    """Work that writes one effect per run, and counts its runs and the backends they ran on."""

    then: Callable[[AsyncSession], Awaitable[object]] | None = None
    receipt: str | None = None
    runs: int = 0
    pids: list[int] = field(default_factory=list)

    async def __call__(self, session: AsyncSession) -> str:
        self.runs += 1
        self.pids.append(await session.scalar(MY_PID) or 0)
        if self.receipt is not None and not await session.scalar(
            ADD_RECEIPT, {"key": self.receipt}
        ):
            raise AlreadyCommitted("from the receipt")
        await session.execute(ADD_EFFECT, {"note": f"run {self.runs}"})
        if self.then is not None and self.runs == 1:
            await self.then(session)
        return f"run {self.runs}"


class Database:
    """The database from beside: on connections of its own, whatever the tested ones suffer."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def run(self, sql: str, *arguments: object) -> list[asyncpg.Record]:
        async with connected(self._url) as connection:
            if arguments:
                return list(await connection.fetch(sql, *arguments))
            await connection.execute(sql)
            return []

    async def value(self, sql: str) -> Any:
        async with connected(self._url) as connection:
            return await connection.fetchval(sql)

    async def effects(self) -> int:
        return int(await self.value("SELECT count(*) FROM effect"))

    async def terminate(self, pid: int) -> None:
        """End the backend and wait until it is gone."""
        await self.run("SELECT pg_terminate_backend($1, 10000)", pid)

    async def until(self, sql: str) -> None:
        """Ask again and again until the answer is yes; each question takes a round trip."""
        async with connected(self._url) as connection, asyncio.timeout(DEADLINE_S):
            while not await connection.fetchval(sql):
                pass


@dataclass
class Scene:
    """One database with its tables, an engine on it, and a view from beside."""

    engine: AsyncEngine
    beside: Database

    @property
    def sessions(self) -> Sessions:
        return make_sessions(self.engine)


def engine_on(url: str, *, command_timeout_s: float | None = None) -> AsyncEngine:
    return create_engine(
        url,
        profile=PoolProfile.LIGHT,
        application_name="test_transaction",
        connect_timeout_s=10.0,
        pool_timeout_s=0.05,
        command_timeout_s=command_timeout_s,
    )


@pytest.fixture
async def scene(database_url: str) -> AsyncIterator[Scene]:
    beside = Database(database_url)
    await beside.run(TABLES)
    engine = engine_on(database_url)
    yield Scene(engine, beside)
    await engine.dispose()


@pytest.fixture
async def behind_proxy(database_url: str) -> AsyncIterator[tuple[Scene, Proxy]]:
    beside = Database(database_url)
    await beside.run(TABLES)
    async with proxied(database_url) as (proxy, url):
        engine = engine_on(url)
        yield Scene(engine, beside), proxy
        await engine.dispose()


@pytest.fixture
def own_server() -> Iterator[OwnPostgres]:
    with own_postgres(durable=True) as postgres:
        yield postgres


@pytest.fixture
async def own_scene(own_server: OwnPostgres) -> AsyncIterator[Scene]:
    """A scene on a server that the test may stop."""
    beside = Database(own_server.url)
    await beside.run(TABLES)
    engine = engine_on(own_server.url)
    yield Scene(engine, beside)
    await engine.dispose()


@pytest.fixture
def logged() -> Iterator[list[Event]]:
    with capture_logs() as events:
        yield events


def replays(logged: list[Event]) -> list[tuple[str, str | None]]:
    return [
        (event["fault"], event["sqlstate"])
        for event in logged
        if event["event"] == "transaction.replayed"
    ]


async def test_the_work_is_committed_and_its_result_returned(scene: Scene) -> None:
    work = Work()

    result = await transaction(scene.sessions, work, name="plain")

    assert result == "run 1"
    assert await scene.beside.effects() == 1
    assert pool_status(scene.engine).checked_out == 0


# --- contention -------------------------------------------------------------------------------


@dataclass
class Locker:
    """Work that updates two counters in its own order, and first lets its rival get its first."""

    first: int
    second: int
    has_first: asyncio.Event
    rival_has_first: asyncio.Event

    async def __call__(self, session: AsyncSession) -> None:
        await session.execute(text("SET LOCAL deadlock_timeout = '20ms'"))
        await session.execute(ADD_EFFECT, {"note": "locker"})
        await session.execute(INCREMENT, {"id": self.first})
        self.has_first.set()
        await self.rival_has_first.wait()
        await session.execute(INCREMENT, {"id": self.second})


async def test_a_deadlocked_transaction_is_replayed_and_both_are_applied_once(
    scene: Scene, logged: list[Event]
) -> None:
    one_locked, two_locked = asyncio.Event(), asyncio.Event()
    there = Locker(1, 2, one_locked, two_locked)
    back = Locker(2, 1, two_locked, one_locked)

    await asyncio.gather(
        transaction(scene.sessions, there, name="there"),
        transaction(scene.sessions, back, name="back"),
    )

    assert set(replays(logged)) == {("contention", "40P01")}
    assert await scene.beside.effects() == 2
    assert await scene.beside.value("SELECT array_agg(value) FROM counter") == [2, 2]


async def test_an_update_of_a_row_changed_since_the_snapshot_is_replayed(
    scene: Scene, logged: list[Event]
) -> None:
    snapshot_taken, row_changed = asyncio.Event(), asyncio.Event()

    async def read_then_write(session: AsyncSession) -> None:
        seen = await session.scalar(text("SELECT value FROM counter WHERE id = 1"))
        snapshot_taken.set()
        await row_changed.wait()
        await session.execute(
            text("UPDATE counter SET value = :value WHERE id = 1"), {"value": (seen or 0) + 1}
        )

    async def change_the_row() -> None:
        await snapshot_taken.wait()
        await scene.beside.run("UPDATE counter SET value = value + 10 WHERE id = 1")
        row_changed.set()

    await asyncio.gather(
        transaction(
            scene.sessions, read_then_write, name="read", isolation_level="REPEATABLE READ"
        ),
        change_the_row(),
    )

    assert replays(logged) == [("contention", "40001")]
    assert await scene.beside.value("SELECT value FROM counter WHERE id = 1") == 11


async def test_serializable_transactions_that_miss_each_other_end_as_if_one_came_first(
    scene: Scene, logged: list[Event]
) -> None:
    have_read = [asyncio.Event(), asyncio.Event()]

    async def note_what_is_there(session: AsyncSession, me: int) -> None:
        count = await session.scalar(COUNT_EFFECTS)
        have_read[me].set()
        await have_read[1 - me].wait()
        await session.execute(ADD_EFFECT, {"note": str(count)})

    await asyncio.gather(
        *(
            transaction(
                scene.sessions,
                lambda session, me=me: note_what_is_there(session, me),  # type: ignore[misc]  # mypy infers no lambda defaults
                name=f"writer {me}",
                isolation_level="SERIALIZABLE",
            )
            for me in (0, 1)
        )
    )

    assert set(replays(logged)) == {("contention", "40001")}
    assert await scene.beside.value("SELECT array_agg(note ORDER BY note) FROM effect") == [
        "0",
        "1",
    ]


async def test_the_isolation_level_lasts_for_one_transaction(scene: Scene) -> None:
    async def show(session: AsyncSession) -> str:
        return str(await session.scalar(text("SHOW transaction_isolation")))

    levels: list[Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"] | None]
    levels = ["SERIALIZABLE", None, "REPEATABLE READ", "READ COMMITTED"]
    shown = [
        await transaction(scene.sessions, show, name="show", isolation_level=level)
        for level in levels
    ]

    assert shown == ["serializable", "read committed", "repeatable read", "read committed"]


async def test_a_row_locked_by_another_is_waited_for_by_replaying(
    scene: Scene, logged: list[Event]
) -> None:
    async with scene.engine.connect() as holder:
        await holder.execute(INCREMENT, {"id": 1})

        async def take_the_lock(session: AsyncSession) -> None:
            if len(replays(logged)) == 3:
                await holder.rollback()
            await session.execute(ADD_EFFECT, {"note": "mine"})
            await session.execute(text("SELECT 1 FROM counter WHERE id = 1 FOR UPDATE NOWAIT"))

        await transaction(scene.sessions, take_the_lock, name="lock")

    assert replays(logged) == [("contention", "55P03")] * 3
    assert await scene.beside.effects() == 1


async def test_a_race_found_by_the_work_is_replayed(scene: Scene, logged: list[Event]) -> None:
    async def find_a_race(session: AsyncSession) -> None:
        raise Race

    work = Work(then=find_a_race)

    assert await transaction(scene.sessions, work, name="race") == "run 2"
    assert replays(logged) == [("contention", None)]
    assert await scene.beside.effects() == 1


# --- outage -----------------------------------------------------------------------------------


async def test_a_terminated_backend_means_a_replay_on_another_connection(
    scene: Scene, logged: list[Event]
) -> None:
    async def lose_the_backend(session: AsyncSession) -> None:
        await scene.beside.terminate(work.pids[0])
        await session.scalar(COUNT_EFFECTS)

    work = Work(then=lose_the_backend)

    assert await transaction(scene.sessions, work, name="terminated") == "run 2"
    assert len(set(work.pids)) == 2
    assert [fault for fault, _ in replays(logged)] == ["outage"]
    assert await scene.beside.effects() == 1
    assert pool_status(scene.engine).checked_out == 0


async def test_a_backend_terminated_during_a_copy_means_a_replay(
    scene: Scene, logged: list[Event]
) -> None:
    async def lose_the_backend_in_copy(session: AsyncSession) -> None:
        driver: Any = (await (await session.connection()).get_raw_connection()).driver_connection

        async def rows() -> AsyncIterator[bytes]:
            yield b"from the copy\n"
            await scene.beside.terminate(work.pids[0])
            yield b"also from the copy\n"

        await driver.copy_to_table("effect", source=rows(), columns=["note"])

    work = Work(then=lose_the_backend_in_copy)

    assert await transaction(scene.sessions, work, name="copy") == "run 2"
    assert len(set(work.pids)) == 2
    assert [fault for fault, _ in replays(logged)] == ["outage"]
    assert await scene.beside.effects() == 1
    assert pool_status(scene.engine).checked_out == 0


async def test_a_backend_lost_before_commit_is_sent_is_replayed_though_there_is_no_receipt(
    scene: Scene, logged: list[Event]
) -> None:
    async def lose_the_backend(session: AsyncSession) -> None:
        await scene.beside.terminate(work.pids[0])

    work = Work(then=lose_the_backend)

    assert await transaction(scene.sessions, work, name="idle") == "run 2"
    assert [fault for fault, _ in replays(logged)] == ["outage"]
    assert await scene.beside.effects() == 1


async def test_a_server_that_turned_read_only_is_left_for_a_new_connection(
    scene: Scene, logged: list[Event]
) -> None:
    async def write_to_a_standby(session: AsyncSession) -> None:
        await session.execute(text("SET LOCAL transaction_read_only = on"))
        await session.execute(ADD_EFFECT, {"note": "refused"})

    work = Work(then=write_to_a_standby)

    assert await transaction(scene.sessions, work, name="standby") == "run 2"
    assert replays(logged) == [("outage", "25006")]
    assert len(set(work.pids)) == 2
    assert await scene.beside.effects() == 1


async def test_a_connection_lost_while_objects_are_flushed_is_replayed_without_a_receipt(
    behind_proxy: tuple[Scene, Proxy], logged: list[Event]
) -> None:
    scene, proxy = behind_proxy
    proxy.arm(Cut.QUESTION, at=b"INSERT INTO team")

    async def add_an_object(session: AsyncSession) -> None:
        session.add(Team(name="Preventers"))

    sessions = async_sessionmaker(scene.engine, autoflush=False)
    await transaction(sessions, add_an_object, name="flush")

    assert proxy.cuts == [Cut.QUESTION]
    assert [fault for fault, _ in replays(logged)] == ["outage"]
    assert await scene.beside.value("SELECT count(*) FROM team") == 1


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_server_restart_in_mid_work_means_a_replay(
    own_server: OwnPostgres,
    own_scene: Scene,
    logged: list[Event],
    mode: Literal["fast", "immediate"],
) -> None:
    async def restart(session: AsyncSession) -> None:
        await asyncio.to_thread(own_server.stop, mode)
        await asyncio.to_thread(own_server.start)
        await session.scalar(COUNT_EFFECTS)

    work = Work(then=restart)

    assert await transaction(own_scene.sessions, work, name="restart") == "run 2"
    assert [fault for fault, _ in replays(logged)] == ["outage"]
    assert await own_scene.beside.effects() == 1


async def test_a_server_that_stays_away_ends_the_transaction_with_the_outage(
    own_server: OwnPostgres,
    own_scene: Scene,
    logged: list[Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("db.transaction.BUDGETS", {Fault.OUTAGE: Budget(0.0, 4, 0.0)})
    await asyncio.to_thread(own_server.stop)
    work = Work()

    with pytest.raises(DBAPIError) as raised:
        await transaction(own_scene.sessions, work, name="away")

    assert sqlstate(raised.value) == "08001"
    assert work.runs == 4
    assert replays(logged) == [("outage", "08001")] * 3
    assert [event["try_no"] for event in logged] == [1, 2, 3, 4]
    assert logged[-1]["event"] == "transaction.gave_up"


async def test_an_exhausted_pool_is_an_outage_that_a_replay_can_outlive(
    scene: Scene, logged: list[Event]
) -> None:
    held = [await scene.engine.connect() for _ in range(pool_status(scene.engine).capacity)]

    async def insert(session: AsyncSession) -> None:
        if replays(logged):
            await asyncio.gather(*(connection.close() for connection in held))
        await session.execute(ADD_EFFECT, {"note": "in the end"})

    await transaction(scene.sessions, insert, name="pool")

    assert replays(logged) == [("outage", None)]
    assert await scene.beside.effects() == 1


async def test_a_plan_made_stale_by_a_migration_is_tried_once_more(
    scene: Scene, logged: list[Event]
) -> None:
    async def read(session: AsyncSession) -> int:
        await session.execute(ADD_EFFECT, {"note": "reader"})
        return len((await session.execute(text("SELECT * FROM counter"))).keys())

    assert await transaction(scene.sessions, read, name="read") == 2
    await scene.beside.run("ALTER TABLE counter ADD COLUMN note text")

    assert await transaction(scene.sessions, read, name="read") == 3
    assert replays(logged) == [("stale_plan", "0A000")]
    assert await scene.beside.effects() == 2


# --- the lost answer to COMMIT ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("cut", "result"), [(Cut.ANSWER, "from the receipt"), (Cut.QUESTION, "run 2")]
)
async def test_receipted_work_is_applied_once_when_the_answer_to_commit_is_lost(
    behind_proxy: tuple[Scene, Proxy], logged: list[Event], cut: Cut, result: str
) -> None:
    scene, proxy = behind_proxy
    proxy.arm(cut)
    work = Work(receipt="chunk 1")

    assert await transaction(scene.sessions, work, name="chunk", receipted=True) == result
    assert proxy.cuts == [cut]
    assert work.runs == 2
    assert [fault for fault, _ in replays(logged)] == ["outage"]
    assert await scene.beside.effects() == 1
    assert pool_status(scene.engine).checked_out == 0


async def test_receipted_work_is_applied_once_through_a_series_of_lost_commits(
    behind_proxy: tuple[Scene, Proxy],
) -> None:
    scene, proxy = behind_proxy
    proxy.arm(Cut.QUESTION, Cut.QUESTION, Cut.ANSWER)
    work = Work(receipt="chunk 1")

    result = await transaction(scene.sessions, work, name="chunk", receipted=True)

    assert result == "from the receipt"
    assert work.runs == 4
    assert await scene.beside.effects() == 1


@pytest.mark.parametrize(("cut", "effects"), [(Cut.ANSWER, 1), (Cut.QUESTION, 0)])
async def test_unreceipted_work_is_never_replayed_after_a_lost_answer_to_commit(
    behind_proxy: tuple[Scene, Proxy], logged: list[Event], cut: Cut, effects: int
) -> None:
    scene, proxy = behind_proxy
    proxy.arm(cut)
    work = Work()

    with pytest.raises(CommitUnknown) as raised:
        await transaction(scene.sessions, work, name="bare")

    assert isinstance(raised.value.__cause__, DBAPIError)
    assert (work.runs, logged) == (1, [])
    assert await scene.beside.effects() == effects
    assert pool_status(scene.engine).checked_out == 0


SOMEONE_WAITS = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"


async def hold_commits_back(beside: Database) -> None:
    """From now on a COMMIT waits for a standby that does not exist."""
    await beside.run("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    await beside.run("SELECT pg_reload_conf()")
    await beside.until("SELECT current_setting('synchronous_standby_names') = 'nobody'")
    await beside.run("CHECKPOINT")  # it is the checkpointer who tells all others to wait


async def let_commits_go(beside: Database) -> None:
    await beside.run("ALTER SYSTEM RESET synchronous_standby_names")
    await beside.run("SELECT pg_reload_conf()")


async def test_the_replay_waits_for_a_commit_that_is_still_under_way(
    own_server: OwnPostgres, own_scene: Scene
) -> None:
    beside = own_scene.beside
    await hold_commits_back(beside)

    async def let_the_commit_end() -> int:
        await beside.until(SOMEONE_WAITS)
        visible = await beside.effects()
        await let_commits_go(beside)
        return visible

    work = Work(receipt="chunk 1")
    async with proxied(own_server.url) as (proxy, url):
        proxy.arm(Cut.CLIENT)
        engine = engine_on(url)
        result, visible_before = await asyncio.gather(
            transaction(make_sessions(engine), work, name="chunk", receipted=True),
            let_the_commit_end(),
        )
        await engine.dispose()

    assert (result, visible_before) == ("from the receipt", 0)
    assert work.runs == 2
    assert await beside.effects() == 1


async def test_a_commit_over_the_command_timeout_leaves_its_connection_and_its_outcome_open(
    own_server: OwnPostgres, own_scene: Scene
) -> None:
    await hold_commits_back(own_scene.beside)
    engine = engine_on(own_server.url, command_timeout_s=3.0)
    work = Work(receipt="chunk 1")

    result = await transaction(make_sessions(engine), work, name="chunk", receipted=True)
    await engine.dispose()

    assert result == "from the receipt"
    assert len(set(work.pids)) == work.runs == 2
    assert await own_scene.beside.effects() == 1


# --- errors that are not tried again ----------------------------------------------------------


async def test_an_integrity_error_is_raised_at_once_and_rolls_back(
    scene: Scene, logged: list[Event]
) -> None:
    async def break_the_key(session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO counter VALUES (1, 5)"))

    work = Work(then=break_the_key)

    with pytest.raises(IntegrityError):
        await transaction(scene.sessions, work, name="key")

    assert (work.runs, logged) == (1, [])
    assert await scene.beside.effects() == 0


async def test_a_deferred_constraint_is_an_integrity_error_too(scene: Scene) -> None:
    await scene.beside.run(
        "ALTER TABLE effect ADD CONSTRAINT effect_once UNIQUE (note) DEFERRABLE INITIALLY DEFERRED"
    )

    async def repeat_the_note(session: AsyncSession) -> None:
        await session.execute(ADD_EFFECT, {"note": "run 1"})

    work = Work(then=repeat_the_note)

    with pytest.raises(IntegrityError):
        await transaction(scene.sessions, work, name="deferred")

    assert work.runs == 1
    assert await scene.beside.effects() == 0


async def test_an_error_that_the_work_swallowed_does_not_pass_for_a_commit(scene: Scene) -> None:
    async def swallow(session: AsyncSession) -> None:
        with suppress(DBAPIError):
            await session.execute(text("SELECT 1 / 0"))

    work = Work(then=swallow)

    with pytest.raises(DBAPIError) as raised:
        await transaction(scene.sessions, work, name="swallow")

    assert sqlstate(raised.value) == "25P02"
    assert work.runs == 1
    assert await scene.beside.effects() == 0


async def test_the_works_own_error_is_raised_as_it_is(scene: Scene) -> None:
    async def fail(session: AsyncSession) -> None:
        raise KeyError("heroes")

    work = Work(then=fail)

    with pytest.raises(KeyError, match="heroes"):
        await transaction(scene.sessions, work, name="own")

    assert work.runs == 1
    assert await scene.beside.effects() == 0


async def test_the_works_own_error_is_not_hidden_by_a_connection_that_is_gone(
    scene: Scene, logged: list[Event]
) -> None:
    async def fail_on_a_lost_connection(session: AsyncSession) -> None:
        await scene.beside.terminate(work.pids[0])
        raise KeyError("heroes")

    work = Work(then=fail_on_a_lost_connection)

    with pytest.raises(KeyError, match="heroes"):
        await transaction(scene.sessions, work, name="own")

    assert (work.runs, logged) == (1, [])
    assert await scene.beside.effects() == 0
    assert pool_status(scene.engine).checked_out == 0


async def test_a_time_limit_of_the_works_own_is_no_outage(
    scene: Scene, logged: list[Event]
) -> None:
    async def take_too_long(session: AsyncSession) -> None:
        async with asyncio.timeout(0.05):
            await session.execute(text("SELECT pg_sleep(60)"))  # what is cut short

    work = Work(then=take_too_long)

    with pytest.raises(TimeoutError):
        await transaction(scene.sessions, work, name="slow")

    assert (work.runs, logged) == (1, [])
    assert await scene.beside.effects() == 0
    assert pool_status(scene.engine).checked_out == 0


async def test_work_that_finds_its_receipt_is_rolled_back_and_gives_the_earlier_result(
    scene: Scene,
) -> None:
    async def notice_late(session: AsyncSession) -> None:
        raise AlreadyCommitted(17)

    work = Work(then=notice_late)

    result: object = await transaction(scene.sessions, work, name="late", receipted=True)

    assert result == 17
    assert work.runs == 1
    assert await scene.beside.effects() == 0


# --- budgets ----------------------------------------------------------------------------------


def work_that_fails_with(*errors: Exception) -> Work:
    """Work whose first runs end with these errors, in this order."""
    remaining = list(errors)

    class Failing(Work):
        async def __call__(self, session: AsyncSession) -> str:
            result = await super().__call__(session)
            if remaining:
                raise remaining.pop(0)
            return result

    return Failing()


@pytest.fixture
def small_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(first_wait_s=0.001, tries=3, max_wait_s=0.001)
    monkeypatch.setattr("db.transaction.BUDGETS", {Fault.CONTENTION: budget, Fault.OUTAGE: budget})


@pytest.mark.usefixtures("small_budgets")
async def test_contention_and_outage_are_counted_apart(scene: Scene) -> None:
    lost = ConnectionResetError("lost")
    work = work_that_fails_with(Race(), lost, Race(), lost)

    assert await transaction(scene.sessions, work, name="mixed") == "run 5"
    assert await scene.beside.effects() == 1


@pytest.mark.usefixtures("small_budgets")
async def test_a_budget_that_is_used_up_raises_the_last_error(
    scene: Scene, logged: list[Event]
) -> None:
    work = work_that_fails_with(
        Race("first"), ConnectionResetError("lost"), Race("second"), Race("third"), Race("fourth")
    )

    with pytest.raises(Race, match="third"):
        await transaction(scene.sessions, work, name="mixed")

    assert work.runs == 4
    assert [event["event"] for event in logged] == [
        *["transaction.replayed"] * 3,
        "transaction.gave_up",
    ]
    assert await scene.beside.effects() == 0


async def test_every_replay_is_told_with_its_reason(scene: Scene, logged: list[Event]) -> None:
    work = work_that_fails_with(Race("row 7 is gone"))

    await transaction(scene.sessions, work, name="told")

    (event,) = logged
    assert 0 <= event.pop("wait_s") <= 0.010
    assert event == {
        "event": "transaction.replayed",
        "log_level": "warning",
        "name": "told",
        "fault": "contention",
        "sqlstate": None,
        "reason": "Race: row 7 is gone",
        "try_no": 1,
    }


# --- one inside another -----------------------------------------------------------------------


async def test_a_transaction_inside_another_is_refused(scene: Scene) -> None:
    async def open_another(session: AsyncSession) -> None:
        await transaction(scene.sessions, Work(), name="inner")

    work = Work(then=open_another)

    with pytest.raises(NestedTransaction, match='"inner" was opened inside "outer"'):
        await transaction(scene.sessions, work, name="outer")

    assert work.runs == 1
    assert await scene.beside.effects() == 0


async def test_a_transaction_in_a_task_started_inside_another_is_refused(scene: Scene) -> None:
    async def open_another(session: AsyncSession) -> None:
        await asyncio.create_task(transaction(scene.sessions, Work(), name="inner"))

    with pytest.raises(NestedTransaction):
        await transaction(scene.sessions, Work(then=open_another), name="outer")

    assert await scene.beside.effects() == 0


async def test_a_task_that_outlives_the_transaction_may_open_its_own(scene: Scene) -> None:
    outer_is_over = asyncio.Event()
    late: list[asyncio.Task[str]] = []

    async def open_one_later() -> str:
        await outer_is_over.wait()
        return await transaction(scene.sessions, Work(), name="later")

    async def start_a_task(session: AsyncSession) -> None:
        late.append(asyncio.create_task(open_one_later()))

    await transaction(scene.sessions, Work(then=start_a_task), name="outer")
    outer_is_over.set()
    await late[0]

    assert await scene.beside.effects() == 2


async def test_transactions_may_follow_each_other_and_run_side_by_side(scene: Scene) -> None:
    await transaction(scene.sessions, Work(), name="first")
    await asyncio.gather(
        *(transaction(scene.sessions, Work(), name=f"beside {n}") for n in range(5))
    )

    assert await scene.beside.effects() == 6


# --- cancellation -----------------------------------------------------------------------------

ANY_TRANSACTION_OPEN = """
SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'test_transaction'
               AND datname = current_database() AND xact_start IS NOT NULL)
"""


async def cancel_when(task: asyncio.Task[Any], condition: Awaitable[object]) -> None:
    await condition
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(DEADLINE_S):
            await task


async def test_cancellation_while_the_work_waits_rolls_back(scene: Scene) -> None:
    waiting = asyncio.Event()

    async def wait_forever(session: AsyncSession) -> None:
        waiting.set()
        await asyncio.Event().wait()

    work = Work(then=wait_forever)
    task = asyncio.create_task(transaction(scene.sessions, work, name="cancelled"))
    await cancel_when(task, waiting.wait())

    assert work.runs == 1
    assert await scene.beside.effects() == 0
    assert not await scene.beside.value(ANY_TRANSACTION_OPEN)
    assert pool_status(scene.engine).checked_out == 0


async def test_cancellation_during_a_statement_rolls_back(scene: Scene) -> None:
    async def sleep_in_the_server(session: AsyncSession) -> None:
        await session.execute(text("SELECT pg_sleep(600)"))  # what is cancelled

    work = Work(then=sleep_in_the_server)
    task = asyncio.create_task(transaction(scene.sessions, work, name="cancelled"))
    sleeping = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep')"
    await cancel_when(task, scene.beside.until(sleeping))

    assert work.runs == 1
    assert await scene.beside.effects() == 0
    await scene.beside.until(f"SELECT NOT ({ANY_TRANSACTION_OPEN})")
    assert pool_status(scene.engine).checked_out == 0


async def test_cancellation_between_two_tries_ends_the_wait(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LongBudget(Budget):
        def wait_s(self, failed_tries: int) -> float:
            waiting.set()
            return 3600.0

    waiting = asyncio.Event()
    monkeypatch.setattr("db.transaction.BUDGETS", {Fault.CONTENTION: LongBudget(3600.0, 2, 3600.0)})
    work = work_that_fails_with(Race())
    task = asyncio.create_task(transaction(scene.sessions, work, name="cancelled"))
    await cancel_when(task, waiting.wait())

    assert work.runs == 1
    assert await scene.beside.effects() == 0
