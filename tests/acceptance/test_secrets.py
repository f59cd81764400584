"""Canaries: passwords, keys and sensitive values appear nowhere but where they are named to be."""

import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest
import sqlalchemy as sa
from redis import Redis

from tests.canaries import (
    BROKEN_RULE,
    CANARY,
    DATABASE_PASSWORD,
    INLINE,
    LISTEN_PASSWORD,
    LOOSE_ENDS,
    REDIS_PASSWORD,
    ROWS,
    RULES,
    SEAL_KEYS,
    SEEN,
    SHORT_KEY,
    STORE_SECRETS,
    TAKEN,
    WRONG_PASSWORD,
    Town,
    slips,
)
from tests.own_servers import OwnRedis
from tests.workers import Start, environment, until

LISTENER = "canary_listens_on_"


@pytest.fixture
def guarded_redis(valkey: OwnRedis) -> str:
    """The URL of a Redis that asks for a password."""
    with Redis.from_url(valkey.url) as client:
        client.config_set("requirepass", REDIS_PASSWORD)
    return re.sub("//.*@|//", f"//:{quote(REDIS_PASSWORD, safe='')}@", valkey.url, count=1)


@asynccontextmanager
async def role(
    connection: asyncpg.Connection, database_url: str, prefix: str, password: str, rights: str
) -> AsyncIterator[str]:
    """The URL of the test's database for a role with a password, which is gone after the block."""
    url = sa.make_url(database_url)
    name, secret = f"{prefix}{url.database}", password.replace("'", "''")
    await connection.execute(f"CREATE ROLE {name} LOGIN {rights} PASSWORD '{secret}'")
    yield url.set(username=name, password=password).render_as_string(hide_password=False)
    await connection.execute(
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{name}'"
    )
    await connection.execute(f"REASSIGN OWNED BY {name} TO CURRENT_USER; DROP OWNED BY {name}")
    await connection.execute(f"DROP ROLE {name}")


@pytest.fixture
async def guarded_database(database_url: str, connection: asyncpg.Connection) -> AsyncIterator[str]:
    """Where jobs and data are."""
    async with role(connection, database_url, "canary_", DATABASE_PASSWORD, "SUPERUSER") as url:
        yield url


@pytest.fixture
async def guarded_listening(
    database_url: str, connection: asyncpg.Connection
) -> AsyncIterator[str]:
    """Where workers hear of what SQL enqueues."""
    async with role(connection, database_url, LISTENER, LISTEN_PASSWORD, "") as url:
        yield url


@pytest.fixture
async def town(
    guarded_database: str,
    guarded_listening: str,
    guarded_redis: str,
    tmp_path: Path,
    connection: asyncpg.Connection,
) -> Town:
    await connection.execute(RULES)
    env = environment(
        guarded_database,
        guarded_redis,
        listen_url=guarded_listening,
        seal_key=SEAL_KEYS,
        job_modules="tests.sample_jobs.tell_tales",
        import_folders=f"{tmp_path},s3://bucket",
        log_level="debug",
    )
    return Town({**env, **STORE_SECRETS}, tmp_path, connection)


async def _enqueue_everything(town: Town) -> list[str]:
    """Jobs that go wrong in every way in which a value could slip out; their ids."""
    path = town.folder / "heroes.csv"
    text = "\n".join(["name,secret_name,age,team_id", *ROWS, ""])
    path.write_bytes(text.encode() + b"".join(LOOSE_ENDS))
    inline = json.dumps({"table": "hero", "rows": [{"name": "Lea", "secret_name": INLINE}] * 2})
    unfit = json.dumps({"table": "hero", "rows": {"secret_name": INLINE}})
    job_ids = [
        await town.accepted("import", "hero", str(path)),
        await town.accepted("import", "hero", str(path), "--on-conflict", "update"),
        await town.accepted("import", "hero", str(path), "--atomic"),
        await town.accepted("enqueue", "insert_rows", inline),
    ]
    await town.ended(job_ids)  # lest the update takes away what their rows are to clash with
    job_ids += [
        await town.accepted("delete", "hero", "--filter", f"secret_name={INLINE}"),
        await town.accepted(
            "update", "hero", "--filter", f"secret_name={TAKEN}", "--set", f"secret_name={INLINE}2"
        ),
    ]
    for how in ("integrity", "wrapped", "context", "validation", "cast", "group"):
        payload = json.dumps({"secret": f"{CANARY}i", "how": how})
        job_ids.append(await town.accepted("enqueue", "tell_tales", payload))
    unread = await town.connection.fetchval(
        "INSERT INTO bulwark.job (id, kind, payload, max_attempts, timeout_s)"
        " VALUES (gen_random_uuid(), 'insert_rows', $1::jsonb, 1, 9) RETURNING id::text",
        unfit,
    )
    return [*job_ids, unread]


async def _go_wrong(town: Town) -> None:
    """Commands that are refused: for a value, a server, a password, or a store."""
    long = f"{CANARY}j{'x' * 200}"
    refused = await town.bulwark("update", "hero", "1", "--set", f"secret_name={long}")
    assert refused.exit_code == 2
    assert (await town.bulwark("enqueue", "tell_tales", '{"secret": ["KANARIk"]}')).exit_code == 2
    plan = town.folder / "plan.csv"
    plan.write_text(f"name,secret_name\nAnn,{long}\n")
    await town.bulwark("import", "--plan", str(plan), "--json")
    url, redis = sa.make_url(town.env["BULWARK_DATABASE_URL"]), town.env["BULWARK_REDIS_URL"]
    elsewhere = url.difference_update_query(["host", "port"])
    for wrong in (
        elsewhere.set(host="127.0.0.1", port=1),
        elsewhere.set(host="::bad"),
        url.set(database="nobody_made_it"),
    ):
        text = wrong.render_as_string(hide_password=False)
        await town.bulwark("jobs", BULWARK_DATABASE_URL=text)
        await town.bulwark("health", "--json", BULWARK_DATABASE_URL=text)
        await town.refused_worker(BULWARK_DATABASE_URL=text)
    for wrong_redis in (
        redis.replace(quote(REDIS_PASSWORD, safe=""), WRONG_PASSWORD),
        f"redis://:{WRONG_PASSWORD}@127.0.0.1:1/0",
        f"redis://:{WRONG_PASSWORD}@[::bad/0",
        f"redis://:{WRONG_PASSWORD}/p@ss@127.0.0.1/0",
    ):
        await town.bulwark("health", "--json", BULWARK_REDIS_URL=wrong_redis)
        await town.refused_worker(BULWARK_REDIS_URL=wrong_redis)
        await town.bulwark("enqueue", "maintain_ledger", BULWARK_REDIS_URL=wrong_redis)
    for wrong_setting in (
        {"BULWARK_SEAL_KEY": SHORT_KEY},
        {"BULWARK_LISTEN_URL": f"postgresql://who:{WRONG_PASSWORD}@[::bad/x"},
    ):
        assert (await town.bulwark("audit", "verify", **wrong_setting)).exit_code == 4
        await town.refused_worker(**wrong_setting)
    await town.bulwark("import", "hero", "s3://bucket/heroes.csv", "--spool")


async def _turn_the_listener_away(town: Town) -> None:
    """Let the worker lose the connection on which it listens, and not get another."""
    name = f"{LISTENER}{await town.connection.fetchval('SELECT current_database()')}"
    listening = "FROM pg_stat_activity WHERE usename = $1"

    async def listens() -> bool:
        return bool(await town.connection.fetchval(f"SELECT count(*) {listening}", name))

    async def missed() -> bool:
        return "listen.failed" in town.log

    await until(listens, "the worker listens with the password of BULWARK_LISTEN_URL")
    await town.connection.execute(f"ALTER ROLE {name} NOLOGIN")
    await town.connection.fetch(f"SELECT pg_terminate_backend(pid) {listening}", name)
    await until(missed, "the worker says that it does not hear")


async def _cancel_and_retry(town: Town) -> list[str]:
    """Jobs that were let go no further, and failed ones that have been run again; their ids."""
    payload = json.dumps({"secret": f"{CANARY}l", "how": "integrity"})
    later = ("--run-at", "2999-01-01T00:00:00Z")
    cancelled = [await town.accepted("enqueue", "tell_tales", payload, *later) for _ in range(2)]
    await town.done("cancel", cancelled[0])
    await town.done("cancel", cancelled[1], "--now", "--json")
    assert (await town.bulwark("cancel", "no-such-job")).exit_code == 2
    one = await town.accepted("enqueue", "tell_tales", payload)
    assert await town.ended([*cancelled, one]) == {
        **dict.fromkeys(cancelled, "cancelled"),
        one: "failed",
    }
    await town.done("retry", one)
    await town.ended([one])
    again = await town.done("retry", "--kind", "tell_tales", "--json")
    assert again.count("queued") == 7
    await town.done("retry", "--reason", "poisoned")
    return [*cancelled, one]


async def _seal_and_verify(town: Town) -> None:
    """Seal the audit once it is settled, which another test's transaction may delay."""

    async def sealed() -> bool:
        await town.ended([await town.accepted("audit", "seal")])
        signed = "SELECT count(*) FILTER (WHERE mac IS NOT NULL) FROM bulwark.seal"
        return bool(await town.connection.fetchval(signed))

    await until(sealed, "the audit is sealed and signed")
    for words in (("audit", "verify"), ("audit", "export", "-")):
        await town.done(*words)
    assert json.loads(await town.done("audit", "verify", "--json"))["signatures_checked"]
    path = town.folder / "audit.ndjson"
    await town.done("audit", "export", str(path))
    town.said.append(path.read_text())


async def _read_everything(town: Town, job_ids: Sequence[str]) -> None:
    for words in (
        *(("job", job_id) for job_id in job_ids),
        *(("rejects", job_id) for job_id in job_ids),
        ("jobs", "--limit", "100"),
        ("failed", "--limit", "100"),
        ("audit", "--limit", "1000"),
        ("limit", "default", "--most", "1000"),
        ("limit",),
        ("list", "hero"),
        ("show", "hero", "1"),
        ("models",),
        ("parked",),
        ("schedule",),
        ("health",),
    ):
        await town.bulwark(*words)
        await town.bulwark(*words, "--json")


@pytest.mark.once
async def test_no_secret_and_no_sensitive_value_is_seen_anywhere(town: Town, start: Start) -> None:
    town.processes.append(start(town.env))
    job_ids = await _enqueue_everything(town)
    states = await town.ended(job_ids)
    await _turn_the_listener_away(town)
    await _go_wrong(town)
    job_ids += await _cancel_and_retry(town)
    await town.ended(job_ids)
    await _seal_and_verify(town)
    await _read_everything(town, job_ids)
    assert town.processes.pop().terminate() == 0
    rows = await town.connection.fetch(SEEN)
    told = [*town.said, *(f"{row[0]} {row[1]}" for row in rows), town.log]
    assert list(slips(told)) == []
    assert {*states.values()} == {"succeeded", "failed"}
    assert "job.raised" in town.log
    assert "Traceback" in town.log
    await _the_canaries_were_there(town, job_ids)


async def _the_canaries_were_there(town: Town, job_ids: Sequence[str]) -> None:
    """What was looked for in vain has been at work: each row was rejected for its own cause."""
    rows = await town.connection.fetch(
        "SELECT code FROM bulwark.verdict WHERE job_id = $1::uuid", job_ids[0]
    )
    assert {row["code"] for row in rows} == {
        "unique_violation",
        "check_violation",
        "trigger_exception",
        "foreign_key_violation",
        "invalid",
        "too_many_fields",
        "nul_byte",
        "not_utf8",
        "unclosed_quote",
    }
    hidden = await town.connection.fetch(
        "SELECT before_sensitive::text AS hidden FROM bulwark.audit"
    )
    assert any(TAKEN in (row["hidden"] or "") for row in hidden)
    exported = await town.bulwark("rejects", job_ids[0], "--csv", "-")
    assert BROKEN_RULE in exported.stdout
