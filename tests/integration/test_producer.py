"""A job is accepted with its row, rung after the commit and only then, and never twice."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from arq.connections import ArqRedis
from pydantic import Field, JsonValue, SecretStr, computed_field
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from structlog.testing import capture_logs

from db.engine import PoolProfile, create_engine, make_sessions
from db.ledger.idempotency import idempotency
from db.ledger.job import job as job_table
from db.models.team import Team
from jobs import (
    Bell,
    IdempotencyConflict,
    JobError,
    Jobs,
    Payload,
    PayloadTooLarge,
    Producer,
    UnknownJob,
    job,
)
from jobs import _producer as producer_module
from tests.proxy import Cut, proxied
from tests.stage import waiting_for_a_lock
from tests.workers import until
from worker.redis_pool import make_redis
from worker.relay import Relay

Sessions = async_sessionmaker[AsyncSession]
HOUR = timedelta(hours=1)
MIB = 1024 * 1024


class Rename(Payload):
    """Names with an alias, a default and a computed field, which all have to come through."""

    name: str
    team_id: int = Field(1, alias="teamId")
    row: dict[str, JsonValue] = {}

    @computed_field  # type: ignore[prop-decorator]  # mypy knows property alone
    @property
    def shouted(self) -> str:
        return self.name.upper()


class Weigh(Payload):
    grams: float = 0.0
    secret: SecretStr | None = None
    note: str = ""


class NoJobTakesThis(Payload):
    """Declared nowhere."""


@job(queue="slow", priority=-3, max_attempts=7, timeout_s=42)
async def rename(session: AsyncSession, payload: Rename) -> None:
    """Never run here."""


@job()
async def weigh(session: AsyncSession, payload: Weigh) -> None:
    """Never run here."""


JOBS = Jobs([rename, weigh])


@dataclass
class Shop:
    """A producer with its own PostgreSQL database and Redis."""

    sessions: Sessions
    redis: Redis
    producer: Producer

    async def rung(self, queue: str = "arq:queue") -> list[UUID]:
        """The jobs that arq finds in a queue, in the order in which it takes them."""
        return [UUID(name.decode().split(":")[0]) for name in await self.redis.zrange(queue, 0, -1)]

    async def rows(self) -> list[Any]:
        async with self.sessions() as session:
            return list(await session.execute(sa.select(job_table).order_by(job_table.c.id)))

    async def keys(self) -> list[str]:
        async with self.sessions() as session:
            return list(await session.scalars(sa.select(idempotency.c.key)))

    async def execute(self, statement: str) -> None:
        async with self.sessions.begin() as session:
            await session.execute(sa.text(statement))


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def shop(sessions: Sessions, redis: Redis) -> Shop:
    return Shop(sessions, redis, Producer(sessions, JOBS, Bell(redis)))


@contextmanager
def statements_of(engine: AsyncEngine) -> Iterator[list[str]]:
    """The statements that the engine sends, without what begins and ends a transaction."""
    seen: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        seen.append(statement)

    sa.event.listen(engine.sync_engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        sa.event.remove(engine.sync_engine, "before_cursor_execute", note)


async def calls_of(redis: Redis, command: str) -> int:
    stats = await redis.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {"calls": 0})["calls"])


# Accepting


async def test_a_job_is_in_postgresql_and_rung_when_enqueue_returns(shop: Shop) -> None:
    accepted = await shop.producer.enqueue(Weigh(grams=2.5))
    (row,) = await shop.rows()
    assert (row.id, row.kind, row.state, row.payload) == (
        accepted.job_id,
        "weigh",
        "queued",
        {"grams": 2.5, "secret": None, "note": ""},
    )
    assert accepted.created
    assert await shop.rung() == [accepted.job_id]


async def test_a_job_that_says_nothing_gets_the_options_of_its_declaration(shop: Shop) -> None:
    await shop.producer.enqueue(Rename(name="Ann", teamId=1))
    (row,) = await shop.rows()
    assert (row.queue, row.priority, row.max_attempts, row.timeout_s) == ("slow", -3, 7, 42)
    assert (row.actor, row.correlation_id) == (None, None)


async def test_every_option_reaches_the_row(shop: Shop) -> None:
    run_at = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
    job_id = uuid4()
    await shop.producer.enqueue(
        Rename(name="Ann", teamId=1),
        job_id=job_id,
        run_at=run_at,
        queue="night",
        priority=9,
        attempts=1000,
        timeout_s=604_800,
        actor="ann",
        correlation_id="request 7",
    )
    (row,) = await shop.rows()
    assert (row.id, row.run_at, row.queue, row.priority) == (job_id, run_at, "night", 9)
    assert (row.max_attempts, row.timeout_s) == (1000, 604_800)
    assert (row.actor, row.correlation_id) == ("ann", "request 7")


async def test_a_job_is_rung_in_the_queue_that_it_was_enqueued_for(shop: Shop) -> None:
    accepted = await shop.producer.enqueue(Weigh(), queue="night")
    assert await shop.rung("arq:queue:night") == [accepted.job_id]
    assert await shop.rung() == []


async def test_the_payload_is_stored_as_the_worker_will_read_it(shop: Shop) -> None:
    payload = Rename(name='quote " and \\u0000 in words', teamId=7, row={"deep": [1, None, "é"]})
    await shop.producer.enqueue(payload)
    (row,) = await shop.rows()
    assert row.payload == {
        "name": 'quote " and \\u0000 in words',
        "teamId": 7,
        "row": {"deep": [1, None, "é"]},
    }
    assert Rename.model_validate(row.payload) == payload


async def test_job_ids_sort_by_the_time_they_were_made(shop: Shop) -> None:
    made = [(await shop.producer.enqueue(Weigh())).job_id for _ in range(20)]
    assert made == sorted(made)
    assert {job_id.version for job_id in made} == {7}


# Refusing


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        *(
            ({"run_at": datetime.fromisoformat(text)}, "run_at .* is outside the years 1 to 9999")
            for text in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00")
        ),
        ({"run_at": datetime(2031, 1, 1)}, "no time zone"),  # noqa: DTZ001 - what is refused
        ({"priority": 10}, "priority 10 is out of range; use -9 to 9"),
        ({"priority": -10}, "priority -10 is out of range"),
        ({"attempts": 0}, "attempts 0 is out of range; use 1 to 1000"),
        ({"attempts": 1001}, "attempts 1001"),
        ({"timeout_s": 0}, "timeout_s 0 is out of range; use 1 to 604800"),
        ({"timeout_s": 604_801}, "timeout_s 604801"),
        ({"timeout_s": 1.5}, "timeout_s 1.5 is not a whole number"),
        ({"queue": ""}, "'' is not the name of a queue"),
        ({"queue": "a:b"}, "'a:b' is not the name of a queue"),
        ({"queue": "q" * 64}, "is not the name of a queue"),
        ({"actor": "a\0b"}, "the actor must have"),
        ({"correlation_id": "x" * 501}, "the correlation_id must have 1 to 500 bytes"),
        ({"actor": "\ud800"}, "the actor is not valid Unicode"),
        ({"idempotency_key": ""}, "the idempotency key must have"),
        ({"idempotency_key": "é" * 251}, "the idempotency key must have 1 to 500 bytes"),
    ],
)
async def test_terms_that_cannot_be_kept_are_refused_with_nothing_written(
    shop: Shop, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(JobError, match=complaint):
        await shop.producer.enqueue(Weigh(), **options)
    assert await shop.rows() == []
    assert await shop.keys() == []


@pytest.mark.parametrize(
    ("payload", "complaint"),
    [
        (Rename(name="a\0b", teamId=1), "holds a NUL"),
        (Rename(name="Ann", teamId=1, row={"x": "\\\0"}), "holds a NUL"),
        (Rename(name="Ann", teamId=1, row={"x": float("nan")}), "with another row;"),
        (Rename(name="Ann", teamId=1, row={"x": "\ud800"}), "cannot be written as JSON"),
        (Weigh(grams=float("inf")), "with another grams;"),
        (Weigh(secret=SecretStr("hunter2")), "with another secret;"),
    ],
)
async def test_a_payload_that_would_not_arrive_as_it_is_is_refused(
    shop: Shop, payload: Payload, complaint: str
) -> None:
    with pytest.raises(JobError, match=complaint) as refused:
        await shop.producer.enqueue(payload)
    assert "hunter2" not in str(refused.value)
    assert await shop.rows() == []


async def test_a_payload_that_no_job_takes_is_refused(shop: Shop) -> None:
    with pytest.raises(UnknownJob, match="no job takes a NoJobTakesThis"):
        await shop.producer.enqueue(NoJobTakesThis())


def noted(size_bytes: int) -> Weigh:
    """A payload of exactly so many bytes as JSON, its defaults included."""
    return Weigh(note="x" * (size_bytes - len('{"grams":0.0,"secret":null,"note":""}')))


async def test_a_payload_of_one_mebibyte_is_accepted(shop: Shop) -> None:
    await shop.producer.enqueue(noted(MIB))
    (row,) = await shop.rows()
    assert len(row.payload["note"]) == MIB - 37


async def test_a_payload_above_one_mebibyte_is_refused_with_nothing_written(shop: Shop) -> None:
    with pytest.raises(PayloadTooLarge, match=r"1,048,577 bytes.*put the rows in a file"):
        await shop.producer.enqueue_many([Weigh(), noted(MIB + 1)], idempotency_keys=["a", "b"])
    assert await shop.rows() == []
    assert await shop.keys() == []
    assert await shop.rung() == []


# In the caller's transaction


async def test_in_the_callers_transaction_the_ring_waits_for_the_commit(shop: Shop) -> None:
    async with shop.sessions() as session:
        session.add(Team(name="Red"))
        accepted = await shop.producer.enqueue(Weigh(), session=session)
        assert await shop.rung() == []
        assert await shop.rows() == []
        await session.commit()
        assert await shop.rung() == [accepted.job_id]
    assert [row.id for row in await shop.rows()] == [accepted.job_id]


async def test_a_rollback_takes_the_job_and_its_ring_back(shop: Shop) -> None:
    async with shop.sessions() as session:
        await shop.producer.enqueue(Weigh(), session=session)
        await session.rollback()
        await session.execute(sa.text("SELECT 1"))
        await session.commit()
    assert await shop.rows() == []
    assert await shop.rung() == []


async def test_a_session_closed_without_commit_rings_nothing_even_when_used_again(
    shop: Shop,
) -> None:
    session = shop.sessions()
    await shop.producer.enqueue(Weigh(), session=session)
    await session.close()
    accepted = await shop.producer.enqueue(Weigh(), session=session)
    await session.commit()
    await session.close()
    assert await shop.rung() == [accepted.job_id]


async def test_each_transaction_of_a_session_rings_its_own_jobs_once(shop: Shop) -> None:
    async with shop.sessions() as session:
        first = await shop.producer.enqueue(Weigh(), session=session)
        await session.commit()
        await shop.redis.flushdb()
        second = await shop.producer.enqueue(Weigh(), session=session)
        await session.commit()
    assert first.job_id != second.job_id
    assert await shop.rung() == [second.job_id]


async def test_a_savepoint_rolled_back_drops_its_jobs_only(shop: Shop) -> None:
    async with shop.sessions() as session:
        before = await shop.producer.enqueue(Weigh(), session=session)
        savepoint = await session.begin_nested()
        await shop.producer.enqueue(Weigh(), session=session)
        await savepoint.rollback()
        after = await shop.producer.enqueue(Weigh(), session=session)
        await session.commit()
    assert await shop.rung() == [before.job_id, after.job_id]
    assert [row.id for row in await shop.rows()] == [before.job_id, after.job_id]


async def test_a_released_savepoint_rings_at_the_outermost_commit(shop: Shop) -> None:
    async with shop.sessions() as session:
        async with session.begin_nested():
            accepted = await shop.producer.enqueue(Weigh(), session=session)
        assert await shop.rung() == []
        await session.commit()
    assert await shop.rung() == [accepted.job_id]


async def test_a_released_savepoint_within_one_rolled_back_rings_nothing(shop: Shop) -> None:
    async with shop.sessions() as session:
        outer = await session.begin_nested()
        async with session.begin_nested():
            await shop.producer.enqueue(Weigh(), session=session)
        await outer.rollback()
        await session.commit()
    assert await shop.rows() == []
    assert await shop.rung() == []


async def test_a_commit_inside_an_open_savepoint_rings(shop: Shop) -> None:
    async with shop.sessions() as session:
        await session.begin_nested()
        accepted = await shop.producer.enqueue(Weigh(), session=session)
        await session.commit()
    assert await shop.rung() == [accepted.job_id]


async def test_a_commit_that_postgresql_refuses_rings_nothing(shop: Shop) -> None:
    await shop.execute("CREATE TABLE once (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    async with shop.sessions() as session:
        await session.execute(sa.text("INSERT INTO once VALUES (1), (1)"))
        await shop.producer.enqueue(Weigh(), session=session)
        with pytest.raises(sa.exc.IntegrityError):
            await session.commit()
        await session.rollback()
    assert await shop.rung() == []


# Without Redis


@pytest.fixture
def silent_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_without_redis_the_job_is_accepted_and_the_relay_rings_it_at_once(
    shop: Shop, silent_port: int
) -> None:
    async with make_redis(f"redis://127.0.0.1:{silent_port}/0", 1.0) as down:
        producer = Producer(shop.sessions, JOBS, Bell(down))
        with capture_logs() as logs:
            accepted = await producer.enqueue(Weigh())
    assert [(log["event"], log["log_level"], log["jobs"]) for log in logs] == [
        ("ring.failed", "warning", 1)
    ]
    assert [row.id for row in await shop.rows()] == [accepted.job_id]
    assert [ring.job_id for ring in await relay(shop).ring_due()] == [accepted.job_id]
    assert await shop.rung() == [accepted.job_id]


@asynccontextmanager
async def deaf_redis(port: int) -> AsyncIterator[ArqRedis]:
    """A client, and a server that accepts its connections and never answers."""
    held: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: held.append(writer), "127.0.0.1", port)
    async with server, make_redis(f"redis://127.0.0.1:{port}/0", 30.0) as deaf:
        yield deaf
        for writer in held:
            writer.close()


async def test_a_redis_that_never_answers_does_not_hold_up_the_producer(
    shop: Shop, silent_port: int
) -> None:
    async with deaf_redis(silent_port) as deaf:
        with capture_logs() as logs:
            started_s = time.monotonic()
            accepted = await Producer(shop.sessions, JOBS, Bell(deaf)).enqueue(Weigh())
            assert time.monotonic() - started_s < 20.0  # the client itself would wait for 30
    assert [log["reason"] for log in logs] == ["no answer within 2.0 s"]
    assert [row.id for row in await shop.rows()] == [accepted.job_id]


@pytest.mark.parametrize(("jobs", "wait_s"), [(1, 0.25), (5, 0.75), (100, 1.25)])
async def test_redis_has_more_time_for_more_rings_but_not_without_end(
    shop: Shop, silent_port: int, monkeypatch: pytest.MonkeyPatch, jobs: int, wait_s: float
) -> None:
    monkeypatch.setattr(producer_module, "RING_TIMEOUT_S", 0.25)
    monkeypatch.setattr(producer_module, "JOBS_AT_ONCE", 2)
    async with deaf_redis(silent_port) as deaf:
        with capture_logs() as logs:
            await Producer(shop.sessions, JOBS, Bell(deaf)).enqueue_many([Weigh()] * jobs)
    assert [log["reason"] for log in logs] == [f"no answer within {wait_s} s"]


async def test_a_producer_without_a_bell_leaves_the_ring_to_the_relay(shop: Shop) -> None:
    accepted = await Producer(shop.sessions, JOBS).enqueue(Weigh())
    assert await shop.rung() == []
    await relay(shop).ring_due()
    assert await shop.rung() == [accepted.job_id]


# Deferral and priority


def relay(shop: Shop) -> Relay:
    return Relay(shop.sessions, shop.redis, ("default",), 1.0, set())


async def test_a_deferred_job_is_not_rung_before_it_is_due(shop: Shop) -> None:
    accepted = await shop.producer.enqueue(Weigh(), run_at=datetime.now(UTC) + HOUR)
    assert await shop.rung() == []
    assert await relay(shop).ring_due() == []
    await shop.execute(
        "UPDATE bulwark.job SET run_at = run_at - interval '1 hour', "
        "next_ring_at = next_ring_at - interval '1 hour'"
    )
    await relay(shop).ring_due()
    assert await shop.rung() == [accepted.job_id]


async def test_the_relay_rings_a_deferred_job_once_it_is_due(shop: Shop) -> None:
    accepted = await shop.producer.enqueue(Weigh(), run_at=datetime.now(UTC) + HOUR)
    await shop.execute(
        "UPDATE bulwark.job SET run_at = clock_timestamp() + interval '0.4 s', "
        "next_ring_at = clock_timestamp() + interval '0.4 s'"
    )
    rings = await until(relay(shop).ring_due, "the relay rang the job")
    assert [(ring.job_id, ring.number) for ring in rings] == [(accepted.job_id, 1)]
    (row,) = await shop.rows()
    rung_at = row.next_ring_at - timedelta(seconds=10)
    assert timedelta(0) <= rung_at - row.run_at < timedelta(seconds=5)


async def test_a_run_time_in_the_past_is_due_at_once(shop: Shop) -> None:
    accepted = await shop.producer.enqueue(Weigh(), run_at=datetime.now(UTC) - HOUR)
    assert await shop.rung() == [accepted.job_id]


async def test_higher_priorities_come_first_and_none_lies_in_arqs_future(shop: Shop) -> None:
    by_priority = {
        priority: (await shop.producer.enqueue(Weigh(), priority=priority)).job_id
        for priority in (0, 9, -9, 5, -1)
    }
    expected = [by_priority[priority] for priority in (9, 5, 0, -1, -9)]
    assert await shop.rung() == expected
    now_ms = time.time() * 1000
    scores = [score for _, score in await shop.redis.zrange("arq:queue", 0, -1, withscores=True)]
    assert all(0 < score < now_ms - HOUR.total_seconds() * 1000 for score in scores)


async def test_jobs_of_one_priority_come_in_the_order_of_their_acceptance(shop: Shop) -> None:
    made = [(await shop.producer.enqueue(Weigh())).job_id for _ in range(10)]
    assert await shop.rung() == made


# Many


async def test_five_thousand_jobs_take_one_statement_and_one_pipeline(
    shop: Shop, engine: AsyncEngine
) -> None:
    executed = await calls_of(shop.redis, "exec")
    with statements_of(engine) as statements:
        accepted = await shop.producer.enqueue_many([Weigh(grams=n) for n in range(5000)])
    assert [words for words in statements if "SET CONSTRAINTS" not in words] == [
        words for words in statements if "INSERT INTO bulwark.job " in words
    ]
    assert sum("INSERT INTO bulwark.job " in words for words in statements) == 1
    assert await calls_of(shop.redis, "exec") == executed + 1
    assert await shop.rung() == [one.job_id for one in accepted]
    by_id = {row.id: row.payload for row in await shop.rows()}
    assert [by_id[one.job_id].get("grams", 0.0) for one in accepted] == list(range(5000))


async def test_ten_thousand_jobs_may_each_have_a_key(shop: Shop) -> None:
    keys = [f"key {n}" for n in range(10_000)]
    payloads = [Weigh(grams=n) for n in range(10_000)]
    first = await shop.producer.enqueue_many(payloads, idempotency_keys=keys)
    again = await shop.producer.enqueue_many(payloads, idempotency_keys=keys)
    assert [one.job_id for one in again] == [one.job_id for one in first]
    assert {one.created for one in first} == {True}
    assert {one.created for one in again} == {False}
    assert len(await shop.rows()) == 10_000


async def test_many_jobs_are_accepted_all_or_none(shop: Shop) -> None:
    await shop.execute("ALTER TABLE bulwark.job ADD CHECK (payload ->> 'grams' <> '3.0')")
    with pytest.raises(sa.exc.IntegrityError):
        await shop.producer.enqueue_many([Weigh(grams=n) for n in range(5)])
    assert await shop.rows() == []
    assert await shop.rung() == []


@pytest.mark.parametrize("keys", [None, []])
async def test_no_jobs_at_all_are_accepted_too(shop: Shop, keys: list[str] | None) -> None:
    assert await shop.producer.enqueue_many([], idempotency_keys=keys) == []


async def test_keys_that_do_not_match_the_payloads_in_number_are_refused(shop: Shop) -> None:
    with pytest.raises(JobError, match="2 payloads came with 1 idempotency keys"):
        await shop.producer.enqueue_many([Weigh(), Weigh()], idempotency_keys=["a"])


async def test_a_key_twice_in_one_call_makes_one_job(shop: Shop) -> None:
    payloads = [Weigh(grams=1), Weigh(grams=2), Weigh(grams=1)]
    accepted = await shop.producer.enqueue_many(payloads, idempotency_keys=["a", "b", "a"])
    assert [one.created for one in accepted] == [True, True, False]
    assert accepted[0].job_id == accepted[2].job_id
    assert [row.payload["grams"] for row in await shop.rows()] == [1, 2]


async def test_a_key_twice_in_one_call_with_two_payloads_is_refused(shop: Shop) -> None:
    with pytest.raises(IdempotencyConflict, match="'a' stands beside two different payloads"):
        await shop.producer.enqueue_many(
            [Weigh(grams=1), Weigh(grams=2)], idempotency_keys=["a", "a"]
        )
    assert await shop.rows() == []
    assert await shop.keys() == []


# Idempotency


async def test_the_same_key_and_payload_lead_to_the_first_job(shop: Shop) -> None:
    first = await shop.producer.enqueue(Weigh(grams=1), idempotency_key="k")
    await shop.redis.flushdb()
    again = await shop.producer.enqueue(Weigh(grams=1), idempotency_key="k")
    assert (again.job_id, again.created) == (first.job_id, False)
    assert len(await shop.rows()) == 1
    assert await shop.rung() == []


async def test_the_order_of_names_in_the_payload_makes_no_other_payload(shop: Shop) -> None:
    rows: list[dict[str, JsonValue]] = [{"a": 1, "b": 2}, {"b": 2, "a": 1}]
    first, second = [
        await shop.producer.enqueue(Rename(name="x", teamId=1, row=row), idempotency_key="k")
        for row in rows
    ]
    assert first.job_id == second.job_id


@pytest.mark.parametrize("other", [Weigh(grams=2), Rename(name="Ann", teamId=1)])
async def test_the_same_key_with_another_payload_is_an_error_and_writes_nothing(
    shop: Shop, other: Payload
) -> None:
    first = await shop.producer.enqueue(Weigh(grams=1), idempotency_key="k")
    await shop.redis.flushdb()
    with pytest.raises(IdempotencyConflict, match=f"'k' was used.*{first.job_id}; use a new key"):
        await shop.producer.enqueue(other, idempotency_key="k")
    assert [row.id for row in await shop.rows()] == [first.job_id]
    assert await shop.rung() == []


async def test_a_conflict_leaves_nothing_in_the_callers_transaction(shop: Shop) -> None:
    await shop.producer.enqueue(Weigh(grams=1), idempotency_key="taken")
    async with shop.sessions() as session:
        session.add(Team(name="Red"))
        with pytest.raises(IdempotencyConflict):
            await shop.producer.enqueue_many(
                [Weigh(grams=2), Weigh(grams=3)], session=session, idempotency_keys=["new", "taken"]
            )
        await session.commit()
        assert await session.scalar(sa.select(sa.func.count()).select_from(Team)) == 1
    assert await shop.keys() == ["taken"]
    assert len(await shop.rows()) == 1


async def test_a_key_in_the_callers_transaction_is_free_again_after_its_rollback(
    shop: Shop,
) -> None:
    async with shop.sessions() as session:
        await shop.producer.enqueue(Weigh(grams=1), session=session, idempotency_key="k")
        await session.rollback()
    accepted = await shop.producer.enqueue(Weigh(grams=2), idempotency_key="k")
    assert accepted.created
    assert await shop.rung() == [accepted.job_id]


async def test_an_expired_key_is_free_again(shop: Shop) -> None:
    forgetful = Producer(shop.sessions, JOBS, idempotency_retention=timedelta(0))
    first = await forgetful.enqueue(Weigh(grams=1), idempotency_key="k")
    second = await shop.producer.enqueue(Weigh(grams=2), idempotency_key="k")
    third = await shop.producer.enqueue(Weigh(grams=2), idempotency_key="k")
    assert second.created
    assert second.job_id != first.job_id
    assert (third.job_id, third.created) == (second.job_id, False)


End = Callable[[AsyncSession], Awaitable[None]]


@pytest.mark.parametrize("end", [AsyncSession.commit, AsyncSession.rollback])
async def test_two_transactions_with_one_key_at_the_same_time_make_one_job(
    shop: Shop, end: End
) -> None:
    async with shop.sessions() as session:
        first = await shop.producer.enqueue(Weigh(), session=session, idempotency_key="k")
        second = asyncio.create_task(shop.producer.enqueue(Weigh(), idempotency_key="k"))
        await until(lambda: waiting_for_a_lock(shop.sessions), "the second waits for the first")
        await end(session)
    accepted = await second
    committed = end is AsyncSession.commit
    assert accepted.created is not committed
    assert (accepted.job_id == first.job_id) is committed
    assert [row.id for row in await shop.rows()] == [accepted.job_id]
    assert await shop.rung() == [accepted.job_id]


# A lost answer


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize("cut", [Cut.ANSWER, Cut.QUESTION])
async def test_a_cut_around_the_commit_ends_in_one_job(
    shop: Shop, database_url: str, key: str | None, cut: Cut
) -> None:
    async with proxied(database_url) as (proxy, through):
        engine = create_engine(through, profile=PoolProfile.LIGHT, application_name="producer")
        producer = Producer(make_sessions(engine), JOBS, Bell(shop.redis))
        proxy.arm(cut)
        accepted = await producer.enqueue(Weigh(), idempotency_key=key)
        await engine.dispose()
        assert proxy.cuts == [cut]
    assert accepted.created
    assert [row.id for row in await shop.rows()] == [accepted.job_id]
    assert await shop.rung() == [accepted.job_id]
