"""`bulwark.enqueue`: jobs made in the caller's own transaction, from any language."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.ledger.kind import publish_kinds
from jobs import IdempotencyConflict, Payload, discover_jobs
from jobs._bell import job_id_of, kind_of
from jobs._declaration import Defaults
from jobs._kinds import described
from jobs._producer import MAX_PAYLOAD_BYTES
from jobs.insert_rows import InsertRows
from jobs.transfer_heroes import TransferHeroes
from tests.arq_side import hearing
from tests.inprocess import Bench
from tests.sample_jobs.act_out import ActOut
from tests.stage import SAMPLE_JOBS, Stage, waiting_for_a_lock
from tests.workers import ROOT, until
from worker.redis_pool import make_redis
from worker.relay import Relay

Sessions = async_sessionmaker[AsyncSession]
JOBS = discover_jobs(SAMPLE_JOBS)


async def enqueue(
    connection: asyncpg.Connection, kind: str | None, payload: Any = "{}", /, **options: Any
) -> UUID:
    """Call the function with its options by name, as psql would."""
    text = payload if payload is None or isinstance(payload, str) else json.dumps(payload)
    named = "".join(f", {name} => ${place}" for place, name in enumerate(options, 3))
    found: UUID = await connection.fetchval(
        f"SELECT bulwark.enqueue($1, $2{named})",
        kind,
        text,
        *options.values(),
    )
    return found


@asynccontextmanager
async def refused(sqlstate: str, message: str, hint: str) -> AsyncIterator[None]:
    with pytest.raises(asyncpg.PostgresError, match=message) as caught:
        yield
    assert caught.value.sqlstate == sqlstate
    assert hint in (caught.value.hint or "")


@pytest.fixture
async def published(sessions: Sessions) -> None:
    """What a worker that knows the sample jobs says at its start."""
    async with sessions.begin() as session:
        await publish_kinds(session, described(JOBS))


# What is enqueued


async def test_a_job_is_queued_to_be_rung_at_once_in_the_name_of_the_role(
    connection: asyncpg.Connection, stage: Stage
) -> None:
    job_id = await enqueue(connection, "act_out", {"note": "from SQL"})
    row = await stage.row(job_id)
    assert (row["kind"], json.loads(row["payload"])) == ("act_out", {"note": "from SQL"})
    assert (row["state"], row["ring"], row["next_ring_at"]) == ("queued", 0, row["run_at"])
    assert row["run_at"] == row["created_at"]
    assert row["actor"] == await stage.value("SELECT session_user")
    assert row["correlation_id"] is None


async def test_of_a_kind_that_nobody_declared_the_general_defaults_hold(
    connection: asyncpg.Connection, stage: Stage
) -> None:
    row = await stage.row(await enqueue(connection, "not_yet_written"))
    general = Defaults()
    assert (row["queue"], row["priority"], row["max_attempts"], row["timeout_s"]) == (
        general.queue,
        general.priority,
        general.max_attempts,
        general.timeout_s,
    )


@pytest.mark.usefixtures("published")
async def test_what_is_not_said_is_as_the_kind_declares_it(
    connection: asyncpg.Connection, stage: Stage
) -> None:
    row = await stage.row(await enqueue(connection, "act_out"))
    assert (row["queue"], row["max_attempts"], row["timeout_s"]) == ("default", 3, 60)


@pytest.mark.usefixtures("published")
async def test_every_option_is_kept(connection: asyncpg.Connection, stage: Stage) -> None:
    due = datetime.now(UTC) + timedelta(hours=1)
    options = {
        "queue": "bulk",
        "priority": -9,
        "attempts": 1000,
        "timeout_s": 604_800,
        "actor": "ann",
        "correlation_id": "é" * 250,
    }
    job_id = await enqueue(connection, "act_out", {}, run_at=due, **options)
    row = await stage.row(job_id)
    options["max_attempts"] = options.pop("attempts")
    assert {name: row[name] for name in options} == options
    assert row["run_at"] == row["next_ring_at"] == due


async def test_ids_are_uuids_of_version_7_that_sort_by_the_millisecond(
    connection: asyncpg.Connection,
) -> None:
    rows = await connection.fetch(
        "SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS before, "
        "       bulwark.new_job_id() AS id, "
        "       floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS after "
        "  FROM generate_series(1, 2000)"
    )
    ids = [UUID(str(row["id"])) for row in rows]
    assert {(one.version, one.variant) for one in ids} == {(7, "specified in RFC 4122")}
    assert all(
        row["before"] <= one.int >> 80 <= row["after"] for row, one in zip(rows, ids, strict=True)
    )
    assert len({one.int & (1 << 62) - 1 for one in ids}) == len(ids)


@pytest.mark.parametrize("commits", [True, False])
async def test_the_job_is_there_when_and_only_when_the_transaction_commits(
    connection: asyncpg.Connection, stage: Stage, *, commits: bool
) -> None:
    transaction = connection.transaction()
    await transaction.start()
    job_id = await enqueue(connection, "act_out", {}, idempotency_key="k")
    rows = "SELECT id FROM bulwark.job UNION ALL SELECT job_id FROM bulwark.idempotency"
    assert await stage.rows(rows) == []
    if commits:
        await transaction.commit()
    else:
        await transaction.rollback()
    assert await stage.rows(rows) == [(job_id,)] * 2 * commits


async def test_a_role_needs_nothing_but_to_be_allowed_to_execute_it(
    connection: asyncpg.Connection, stage: Stage
) -> None:
    role = f"producer_{uuid4().hex}"
    await connection.execute(f'CREATE ROLE "{role}"')
    try:
        await connection.execute(f'GRANT USAGE ON SCHEMA bulwark TO "{role}"')
        await connection.execute(f'SET ROLE "{role}"')
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await enqueue(connection, "act_out")
        await connection.execute("RESET ROLE")
        await connection.execute(f'GRANT EXECUTE ON FUNCTION bulwark.enqueue TO "{role}"')
        await connection.execute(f'SET ROLE "{role}"')
        await connection.execute("SET search_path = pg_temp")
        await connection.execute("CREATE TEMP TABLE job (id uuid)")
        job_id = await enqueue(connection, "act_out", {}, idempotency_key="k")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.fetch("SELECT * FROM bulwark.job")
        await connection.execute("DROP TABLE pg_temp.job")
    finally:
        await connection.execute("RESET ROLE")
        await connection.execute(f'DROP OWNED BY "{role}"')
        await connection.execute(f'DROP ROLE "{role}"')
    assert (await stage.row(job_id))["state"] == "queued"


# What is refused


def nested(levels: int) -> str:
    """An object with so many values inside one another."""
    return '{"a": ' + "[" * (levels - 1) + "1" + "]" * (levels - 1) + "}"


@pytest.mark.parametrize(
    ("kind", "payload", "message", "hint"),
    [
        (None, "{}", "the kind must have 1 to 500 bytes", "name of a job"),
        ("", "{}", "the kind must have 1 to 500 bytes", "name of a job"),
        ("é" * 251, "{}", "the kind must have 1 to 500 bytes", "name of a job"),
        ('act"out', "{}", "without quotes, spaces and backslashes", "name of a job"),
        ("act out", "{}", "without quotes, spaces and backslashes", "name of a job"),
        ("act\\out", "{}", "without quotes, spaces and backslashes", "name of a job"),
        ("act_out", '{"a": 1e309}', "a number beyond 1e308", "as a string"),
        ("act_out", '{"a": [-1e5000, {}]}', "a number beyond 1e308", "as a string"),
        ("act_out", nested(100), "nested deeper than 100 levels", "Flatten"),
        ("act_out", nested(1000), "nested deeper than 100 levels", "Flatten"),
        ("act_out", None, "the payload is NULL and no JSON object", "one object"),
        ("act_out", "[1]", "the payload is array and no JSON object", "one object"),
        ("act_out", "null", "the payload is null and no JSON object", "one object"),
        (
            "act_out",
            json.dumps({"note": "x" * MAX_PAYLOAD_BYTES}),
            "the payload of act_out has 1048588 bytes, more than 1048576",
            "import that",
        ),
    ],
)
async def test_a_job_that_is_none_is_refused(
    connection: asyncpg.Connection, kind: str | None, payload: str | None, message: str, hint: str
) -> None:
    async with refused("22023", message, hint):
        await enqueue(connection, kind, payload)


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"idempotency_key": ""}, "the idempotency_key must have 1 to 500 bytes", "leave it out"),
        ({"actor": "é" * 251}, "the actor must have 1 to 500 bytes", "Shorten it"),
        ({"correlation_id": ""}, "the correlation_id must have 1 to 500 bytes", "leave it out"),
        ({"queue": "two words"}, "'two words' is not the name of a queue", "63 letters"),
        ({"queue": "ä"}, "'ä' is not the name of a queue", "63 letters"),
        ({"queue": "a\n"}, "is not the name of a queue", "63 letters"),
        ({"queue": "a" * 64}, "is not the name of a queue", "63 letters"),
        ({"priority": 10}, "priority 10 is out of range", "-9 to 9"),
        ({"priority": -10}, "priority -10 is out of range", "-9 to 9"),
        ({"attempts": 0}, "attempts 0 is out of range", "1 to 1000"),
        ({"attempts": 1001}, "attempts 1001 is out of range", "1 to 1000"),
        ({"timeout_s": 0}, "timeout_s 0 is out of range", "1 to 604800"),
        ({"timeout_s": 604_801}, "timeout_s 604801 is out of range", "1 to 604800"),
    ],
)
async def test_terms_that_cannot_be_kept_are_refused_with_nothing_written(
    connection: asyncpg.Connection, stage: Stage, options: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(asyncpg.InvalidParameterValueError, match=message) as caught:
        await enqueue(connection, "act_out", {}, **options)
    assert hint in (caught.value.hint or "")
    assert await stage.value("SELECT count(*) FROM bulwark.job") == 0


@pytest.mark.parametrize("time", ["infinity", "-infinity", "10000-01-01", "0044-03-15 BC"])
async def test_a_time_that_no_relay_could_wait_for_is_refused(
    connection: asyncpg.Connection, time: str
) -> None:
    async with refused("22023", "run_at .+ is out of range", "1 to 9999"):
        await connection.execute(f"SELECT bulwark.enqueue('act_out', '{{}}', run_at => '{time}')")


async def test_a_full_queue_takes_no_more_but_knows_the_keys_of_what_it_has(
    connection: asyncpg.Connection, stage: Stage
) -> None:
    first = await enqueue(connection, "act_out", {}, idempotency_key="k")
    await stage.value("INSERT INTO bulwark.depth_limit (queue, most) VALUES ('default', 2)")
    await enqueue(connection, "act_out")
    async with refused("54000", "the queue default is full: 2 jobs wait", "bulwark limit"):
        await enqueue(connection, "act_out", {}, idempotency_key="new")
    assert await enqueue(connection, "act_out", {}, idempotency_key="k") == first
    await enqueue(connection, "act_out", {}, queue="bulk")
    await stage.value("UPDATE bulwark.depth_limit SET most = 0")
    async with refused("54000", "the queue default is full: 0 jobs wait", "bulwark limit"):
        await enqueue(connection, "act_out")
    assert await stage.value("SELECT array_agg(key) FROM bulwark.idempotency") == ["k"]


# Idempotency keys


@pytest.mark.usefixtures("published")
async def test_the_same_key_and_payload_return_the_first_job(
    connection: asyncpg.Connection, stage: Stage
) -> None:
    first = await enqueue(connection, "act_out", {"note": "a", "gate": True}, idempotency_key="k")
    for payload in (
        {"gate": True, "note": "a"},
        {"gate": True, "note": "a", "then": "return"},
    ):
        again = await enqueue(connection, "act_out", payload, idempotency_key="k")
        assert again == first
    assert await stage.value("SELECT count(*) FROM bulwark.job") == 1


@pytest.mark.parametrize(
    ("kind", "payload"), [("act_out", {"note": "b"}), ("take_down", {"note": "a"})]
)
async def test_the_same_key_with_another_payload_or_kind_is_refused(
    connection: asyncpg.Connection, stage: Stage, kind: str, payload: dict[str, Any]
) -> None:
    first = await enqueue(connection, "act_out", {"note": "a"}, idempotency_key="k")
    message = f"the idempotency key 'k' was used with another payload, by job {first}"
    async with refused("23505", message, "Use a new key"):
        await enqueue(connection, kind, payload, idempotency_key="k")
    assert await stage.value("SELECT count(*) FROM bulwark.job") == 1


async def test_a_key_of_sql_is_free_again_after_seven_days(
    connection: asyncpg.Connection, stage: Stage
) -> None:
    first = await enqueue(connection, "act_out", {"note": "a"}, idempotency_key="k")
    left = await stage.value("SELECT expires_at - now() FROM bulwark.idempotency")
    assert timedelta(days=6, hours=23) < left < timedelta(days=7)
    await stage.value("UPDATE bulwark.idempotency SET expires_at = now()")
    again = await enqueue(connection, "act_out", {"note": "b"}, idempotency_key="k")
    assert again != first
    assert await stage.value("SELECT job_id FROM bulwark.idempotency") == again


async def test_a_key_whose_job_is_no_longer_kept_still_knows_its_own_payload(
    connection: asyncpg.Connection, stage: Stage
) -> None:
    first = await enqueue(connection, "act_out", {"note": "a"}, idempotency_key="k")
    await stage.value("DELETE FROM bulwark.job")
    again = await enqueue(connection, "act_out", {"note": "a"}, idempotency_key="k")
    assert again == first
    async with refused("23505", "used with another payload", "Use a new key"):
        await enqueue(connection, "act_out", {"note": "b"}, idempotency_key="k")


PAYLOADS: list[tuple[Payload, dict[str, Any], dict[str, Any]]] = [
    (ActOut(note="a"), {"note": "a"}, {"note": "b"}),
    (ActOut(), {}, {"gate": True}),
    (ActOut(note="a"), {"note": "a", "seconds": 0.0, "then": "return"}, {"note": "a", "x": 1}),
    (
        TransferHeroes(hero_ids=[1, 2], to_team_id=3),
        {"to_team_id": 3, "hero_ids": [1, 2]},
        {"to_team_id": 3, "hero_ids": [2, 1]},
    ),
    (
        InsertRows(table="team", rows=[{"name": "Red"}]),
        {"table": "team", "rows": [{"name": "Red"}]},
        {"table": "team", "rows": [{"name": "Red"}, {"name": "Red"}]},
    ),
]


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(("payload", "same", "other"), PAYLOADS)
async def test_a_key_that_sql_used_first_holds_for_python(
    connection: asyncpg.Connection,
    bench: Bench,
    stage: Stage,
    payload: Payload,
    same: dict[str, Any],
    other: dict[str, Any],
) -> None:
    kind = JOBS.of(payload).kind
    first = await enqueue(connection, kind, same, idempotency_key="same")
    await enqueue(connection, kind, other, idempotency_key="other")
    again = await bench.producer.enqueue(payload, idempotency_key="same")
    assert (again.job_id, again.created) == (first, False)
    with pytest.raises(IdempotencyConflict, match="'other' was used with another payload"):
        await bench.producer.enqueue(payload, idempotency_key="other")
    assert await stage.value("SELECT count(*) FROM bulwark.job") == 2


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(("payload", "same", "other"), PAYLOADS)
async def test_a_key_that_python_used_first_holds_for_sql(
    connection: asyncpg.Connection,
    bench: Bench,
    stage: Stage,
    payload: Payload,
    same: dict[str, Any],
    other: dict[str, Any],
) -> None:
    kind = JOBS.of(payload).kind
    first = await bench.producer.enqueue(payload, idempotency_key="k")
    assert await enqueue(connection, kind, same, idempotency_key="k") == first.job_id
    async with refused("23505", "used with another payload", "Use a new key"):
        await enqueue(connection, kind, other, idempotency_key="k")
    assert await stage.value("SELECT count(*) FROM bulwark.job") == 1


async def test_who_comes_second_with_a_key_waits_for_the_first(
    connection: asyncpg.Connection, bench: Bench, stage: Stage, sessions: Sessions
) -> None:
    transaction = connection.transaction()
    await transaction.start()
    first = await enqueue(connection, "act_out", {"note": "a"}, idempotency_key="k")
    second = asyncio.create_task(bench.producer.enqueue(ActOut(note="a"), idempotency_key="k"))
    await until(lambda: waiting_for_a_lock(sessions), "the second waits for the first")
    await transaction.commit()
    assert (await second).job_id == first


# What becomes of it


async def test_a_payload_that_does_not_fit_fails_with_its_reason_when_it_is_claimed(
    connection: asyncpg.Connection, bench: Bench, stage: Stage
) -> None:
    job_id = await enqueue(connection, "act_out", {"note": 7, "gaet": True})
    await bench.deliver(job_id)
    assert await stage.ended_as(job_id) == ("failed", "rejected", 1)
    error = (await stage.row(job_id))["error"]
    assert error.startswith("the payload does not fit ActOut: ")
    assert "note: " in error
    assert "gaet: " in error


async def test_the_largest_and_the_deepest_payload_that_is_taken_can_be_read(
    connection: asyncpg.Connection, bench: Bench, stage: Stage
) -> None:
    for payload in (
        nested(99),
        '{"a": 1e308, "b": -1e308, "c": 1e-5000, "d": "' + "1" * 5000 + '"}',
        json.dumps({"note": "x" * (MAX_PAYLOAD_BYTES - len('{"note": ""}'))}),
    ):
        job_id = await enqueue(connection, "act_out", payload)
        await bench.deliver(job_id)
        assert (await stage.row(job_id))["state"] in ("succeeded", "failed")


async def test_a_kind_with_letters_of_any_script_is_rung_as_any_other(
    connection: asyncpg.Connection, sessions: Sessions, redis_url: str
) -> None:
    job_id = await enqueue(connection, "überführen")
    async with hearing(redis_url) as ear, make_redis(redis_url, 5.0) as redis:
        await Relay(sessions, redis, ("default",), 1.0, set()).ring_due()
        (heard,) = await ear.claim(10)
    assert heard.is_ring
    assert (job_id_of(heard.arq_id.decode()), kind_of(heard.content)) == (job_id, "überführen")


# What workers tell of kinds


async def test_a_kind_is_written_again_only_when_it_has_changed(
    sessions: Sessions, stage: Stage
) -> None:
    rows = described(JOBS)
    written = "SELECT array_agg(xmin::text ORDER BY kind) FROM bulwark.kind"
    seen = []
    for _ in range(2):
        async with sessions.begin() as session:
            await publish_kinds(session, rows)
        seen.append(await stage.value(written))
    assert seen[0] == seen[1]
    changed = [{**rows[0], "timeout_s": 7}, *rows[1:]]
    async with sessions.begin() as session:
        await publish_kinds(session, changed)
    assert await stage.value("SELECT count(*) FROM bulwark.kind WHERE timeout_s = 7") == 1
    assert await stage.value("SELECT count(*) FROM bulwark.kind") == len(rows)


# The document

BLOCKS = re.findall(
    r"^```sql\n(.*?)^```$",
    (ROOT / "docs" / "enqueue-from-sql.md").read_text(),
    re.MULTILINE | re.DOTALL,
)


async def test_the_examples_of_the_document_do_what_it_says(
    connection: asyncpg.Connection, bench: Bench, stage: Stage
) -> None:
    transfer, trigger = BLOCKS
    await connection.execute(transfer)
    (moved,) = await bench.run_jobs()
    assert (moved.kind, moved.state) == ("transfer_heroes", "succeeded")
    assert await stage.value("SELECT team_id FROM hero") == 1
    await connection.execute(trigger)
    (deleted,) = await bench.run_jobs()
    assert (deleted.kind, deleted.state) == ("soft_delete_rows", "succeeded")
    assert await stage.value("SELECT count(*) FROM hero WHERE deleted_at IS NOT NULL") == 1
