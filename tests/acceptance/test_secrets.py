"""Canaries: passwords, keys and sensitive values appear nowhere but where they are named to be."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import quote

import asyncpg
import psutil
import pytest
import sqlalchemy as sa
from redis import Redis
from typer.testing import CliRunner, Result

from tests.own_servers import OwnRedis
from tests.workers import Start, WorkerProcess, environment, run_bulwark, until
from worker.cli import app
from worker.exit_codes import ExitCode

CANARY = "KANARI"
"""The beginning of every value that must not be seen."""
DATABASE_PASSWORD = f"{CANARY}1 p@ss/w:rd#%é"
REDIS_PASSWORD = f"{CANARY}2 p@ss/w:rd#%é"
WRONG_PASSWORD = f"{CANARY}3-wrong"
STORE_SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAKNOWN",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}4",
    "AWS_SESSION_TOKEN": f"{CANARY}5",
    "AWS_ENDPOINT": "http://127.0.0.1:1",
    "AWS_ALLOW_HTTP": "true",
    "AWS_REGION": "eu-north-1",
}
TAKEN = f"{CANARY}6 is taken"
BROKEN_RULE = f"{CANARY}7 breaks a rule"
TRIGGERED = f"{CANARY}8 is refused by a trigger"
INLINE = f"{CANARY}9 stands in a payload"
RULES = f"""
    CREATE UNIQUE INDEX one_secret ON hero (secret_name);
    ALTER TABLE hero ADD CONSTRAINT no_broken_rule CHECK (secret_name NOT LIKE '%breaks a rule%');
    CREATE FUNCTION quote_it() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.secret_name LIKE '%by a trigger%' THEN
            RAISE EXCEPTION 'no hero may be called %', NEW.secret_name;
        END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER quote_it BEFORE INSERT OR UPDATE ON hero
        FOR EACH ROW EXECUTE FUNCTION quote_it();
    INSERT INTO hero (name, secret_name) VALUES ('Old', '{TAKEN}');
"""
ROWS = [
    f"Ann,{TAKEN},5,",
    f"Bob,{BROKEN_RULE},5,",
    f"Cid,{TRIGGERED},5,",
    f"Dan,{CANARY}a{'x' * 200},5,",
    f"Eve,{CANARY}b,minus one,",
    f"Fay,{CANARY}c,5,77",
    f"Gil,{CANARY}d,5,,too much",
    f"Hal,{CANARY}e\0,5,",
    f"Ida,{CANARY}f,5,",
]
LOOSE_ENDS = [b"Jim,KANARIg \xff,5,\n", b'Kay,"KANARIh never closed,5,\n']
SEEN = """
    SELECT 'job', to_jsonb(t) - 'payload' FROM bulwark.job t
    UNION ALL SELECT 'verdict', to_jsonb(t) - 'raw' FROM bulwark.verdict t
    UNION ALL SELECT 'audit', to_jsonb(t) - 'before_sensitive' FROM bulwark.audit t
    UNION ALL SELECT 'chunk', to_jsonb(t) FROM bulwark.chunk t
    UNION ALL SELECT 'worker', to_jsonb(t) FROM bulwark.worker t
    UNION ALL SELECT 'parked', to_jsonb(t) - 'message' FROM bulwark.parked t
    UNION ALL SELECT 'progress', to_jsonb(t) FROM bulwark.progress t
    UNION ALL SELECT 'idempotency', to_jsonb(t) FROM bulwark.idempotency t
"""
ACTIVITY = "SELECT application_name, query FROM pg_stat_activity WHERE datname = current_database()"


@dataclass
class Town:
    """Servers with passwords, what has been said about them, and who is at work there."""

    env: dict[str, str]
    folder: Path
    connection: asyncpg.Connection
    said: list[str] = field(default_factory=list)
    processes: list[WorkerProcess] = field(default_factory=list)

    async def bulwark(self, *words: str, **env: str) -> Result:
        """Run a command in this process, and keep what it says."""
        invoke = partial(CliRunner().invoke, app, words, env=self.env | env)
        done = await asyncio.to_thread(invoke)
        self.said += [done.stdout, done.stderr, repr(done.exception)]
        await self.look()
        return done

    async def refused_worker(self, **env: str) -> None:
        """Start a worker in a process of its own, which does not come up."""
        done = await asyncio.to_thread(
            run_bulwark, "worker", env=self.env | env, folder=self.folder
        )
        assert done.returncode in (ExitCode.UNREACHABLE, ExitCode.NOT_READY), done.stderr
        self.said += [done.stdout, done.stderr]

    async def accepted(self, *words: str, **env: str) -> str:
        """Enqueue a job; its id."""
        done = await self.bulwark(*words, "--json", **env)
        assert done.exit_code == 0, done.stderr
        return str(json.loads(done.stdout)["job_id"])

    async def look(self) -> None:
        """Keep what is seen at this moment of processes and of PostgreSQL's sessions."""
        rows = await self.connection.fetch(ACTIVITY)
        self.said += [f"{row['application_name']} {row['query']}" for row in rows]
        for process in self.processes:
            self.said.append(" ".join(psutil.Process(process.pid).cmdline()))

    async def ended(self, job_ids: Sequence[str]) -> dict[str, str]:
        """The states of these jobs, once all have ended."""

        async def look() -> dict[str, str] | None:
            await self.look()
            rows = await self.connection.fetch(
                "SELECT id::text, state FROM bulwark.job WHERE id = ANY($1::uuid[])", job_ids
            )
            states = {row["id"]: row["state"] for row in rows}
            return states if {*states.values()} <= {"succeeded", "failed"} else None

        return await until(look, "all jobs have ended")


@pytest.fixture
def guarded_redis(valkey: OwnRedis) -> str:
    """The URL of a Redis that asks for a password."""
    with Redis.from_url(valkey.url) as client:
        client.config_set("requirepass", REDIS_PASSWORD)
    return re.sub("//.*@|//", f"//:{quote(REDIS_PASSWORD, safe='')}@", valkey.url, count=1)


@pytest.fixture
async def guarded_database(database_url: str, connection: asyncpg.Connection) -> AsyncIterator[str]:
    """The URL of the test's database for a role with a password."""
    name = f"canary_{sa.make_url(database_url).database}"
    secret = DATABASE_PASSWORD.replace("'", "''")
    await connection.execute(f"CREATE ROLE {name} LOGIN SUPERUSER PASSWORD '{secret}'")
    url = sa.make_url(database_url).set(username=name, password=DATABASE_PASSWORD)
    yield url.render_as_string(hide_password=False)
    await connection.execute(
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{name}'"
    )
    await connection.execute(f"REASSIGN OWNED BY {name} TO CURRENT_USER; DROP OWNED BY {name}")
    await connection.execute(f"DROP ROLE {name}")


@pytest.fixture
async def town(
    guarded_database: str, guarded_redis: str, tmp_path: Path, connection: asyncpg.Connection
) -> Town:
    await connection.execute(RULES)
    env = environment(
        guarded_database,
        guarded_redis,
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
    await town.bulwark("import", "hero", "s3://bucket/heroes.csv", "--spool")


async def _read_everything(town: Town, job_ids: Sequence[str]) -> None:
    for words in (
        *(("job", job_id) for job_id in job_ids),
        *(("rejects", job_id) for job_id in job_ids),
        ("jobs", "--limit", "100"),
        ("audit", "--limit", "1000"),
        ("list", "hero"),
        ("show", "hero", "1"),
        ("failed",),
        ("models",),
        ("parked",),
        ("schedule",),
        ("health",),
    ):
        await town.bulwark(*words)
        if words[0] != "failed":
            await town.bulwark(*words, "--json")


def _slips(texts: Sequence[str]) -> Iterator[str]:
    """Where a canary is seen, with some text around it; quoted as in a URL, too."""
    for text in texts:
        for found in re.finditer(CANARY, text):
            yield text[max(0, found.start() - 300) : found.end() + 60]


@pytest.mark.once
async def test_no_secret_and_no_sensitive_value_is_seen_anywhere(town: Town, start: Start) -> None:
    town.processes.append(start(town.env))
    job_ids = await _enqueue_everything(town)
    states = await town.ended(job_ids)
    await _go_wrong(town)
    await _read_everything(town, job_ids)
    assert town.processes.pop().terminate() == 0
    log = (town.folder / "worker-0.log").read_text()
    rows = await town.connection.fetch(SEEN)
    told = [*town.said, *(f"{row[0]} {row[1]}" for row in rows), log]
    assert list(_slips(told)) == []
    assert {*states.values()} == {"succeeded", "failed"}
    assert "job.raised" in log
    assert "Traceback" in log
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
