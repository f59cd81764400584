"""Old and new programs side by side: on one queue, on the schema of the newer one."""

import io
import json
import re
import subprocess
import tarfile
import time
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from arq.connections import ArqRedis
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db import migrations
from db.ledger.rotation import ROTATED
from jobs import Bell, Payload, Producer, discover_jobs
from jobs._spooling import enqueue_file
from jobs.insert_rows import InsertRows
from jobs.maintain_ledger import MaintainLedger
from jobs.purge_deleted_rows import PurgeDeletedRows
from jobs.soft_delete_rows import SoftDeleteRows
from jobs.transfer_heroes import TransferHeroes
from jobs.update_rows import UpdateRows
from tests.invariants import Losses, check_invariants
from tests.months import id_at, make_month
from tests.sample_jobs.act_out import ActOut
from tests.stage import SAMPLE_JOBS, Stage
from tests.workers import ROOT, Start, WorkerProcess, environment, until

ACT_OUT = "tests.sample_jobs.act_out"
FIRST_ADDITIVE = "0007"
"""Migrations after this one only add, so that the programs before them go on working."""
HEROES = 120
IMPORTED = 3_000
SOON_S = 20.0
LONG_AGO = datetime.now(UTC) - timedelta(days=400)
NO_MONTH = datetime.now(UTC) - timedelta(days=4000)
LONG_DELETED = """
    INSERT INTO hero (name, deleted_at)
    SELECT 'H' || n, CASE WHEN n > 3 THEN now() - interval '60 days' END
      FROM generate_series(1, 5) AS n
"""
STRAY = """
    INSERT INTO bulwark.audit
           (job_id, chunk_no, entry_no, claim_id, kind, action, table_name, rows, keys)
    VALUES ($1, 1, 0, gen_random_uuid(), 'old', 'old', 'old', 1, '{}')
"""
PUT_OFF = """
    UPDATE bulwark.job SET next_ring_at = now() + interval '5 min' WHERE state = 'queued'
"""
"""As for jobs that have waited for long, so that the relay does not help."""


def git(*words: str) -> bytes:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"there is no git history to take an older program from: {words[0]} failed")
    return done.stdout


def newest_migration() -> Path:
    scripts = ScriptDirectory.from_config(migrations.configuration("postgresql://unused/unused"))
    head = scripts.get_revision("head")
    assert head is not None
    return Path(head.path).relative_to(ROOT)


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of the commit before the newest migration came."""
    added = git("log", "-1", "--diff-filter=A", "--format=%H", "--", str(newest_migration()))
    if not added:
        pytest.skip("the newest migration is not committed yet")
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(fileobj=io.BytesIO(git("archive", f"{added.decode().strip()}^"))) as archive:
        archive.extractall(folder, filter="data")
    assert not (folder / newest_migration()).exists()
    return folder


@pytest.fixture
def new_env(database_url: str, redis_url: str) -> dict[str, str]:
    return environment(
        database_url, redis_url, job_modules=ACT_OUT, max_jobs="2", log_format="json"
    )


@pytest.fixture
def old_env(database_url: str, redis_url: str, older: Path) -> dict[str, str]:
    """It knows the jobs of the package, and none of the sample jobs."""
    env = environment(database_url, redis_url, max_jobs="2", log_format="json")
    del env["BULWARK_SCHEDULES"]  # it need not know those of this program
    return {**env, "PYTHONPATH": str(older)}


@pytest.fixture
async def producer(
    sessions: async_sessionmaker[AsyncSession], redis_url: str
) -> AsyncIterator[Producer]:
    async with Redis.from_url(redis_url) as redis:
        yield Producer(sessions, discover_jobs(SAMPLE_JOBS), Bell(redis))


async def until_started(stage: Stage, worker: WorkerProcess) -> None:
    async def started() -> bool:
        assert worker.running, worker.log.read_text()
        return any(one["event"] == "worker.started" for one in worker.events())

    await until(started, "the worker has started")


async def until_all_ended(stage: Stage) -> None:
    async def ended() -> bool:
        open_jobs = "SELECT count(*) FROM bulwark.job WHERE state IN ('queued', 'running')"
        return bool(await stage.value(open_jobs) == 0)

    await until(ended, "every job has ended", 60.0)


# An older program on the newer schema


async def test_the_program_before_works_beside_this_one_on_its_schema_and_all_happens_once(
    start: Start,
    old_env: Mapping[str, str],
    new_env: Mapping[str, str],
    stage: Stage,
    producer: Producer,
    tmp_path: Path,
) -> None:
    await stage.value("INSERT INTO team (name) VALUES ('Red')")
    await stage.value(
        f"INSERT INTO hero (name) SELECT 'H' || n FROM generate_series(1, {HEROES}) AS n"
    )
    old, new = start(old_env), start(new_env)
    for worker in (old, new):
        await until_started(stage, worker)
    assert any(one["event"] == "schema.newer" for one in old.events())
    await enqueue_transfers_and_imports(producer, tmp_path)
    await until_all_ended(stage)
    assert await stage.value("SELECT count(*) FROM bulwark.job WHERE state <> 'succeeded'") == 0
    assert await stage.value("SELECT count(*) FROM hero WHERE team_id = 1") == HEROES
    assert await stage.value("SELECT count(*) FROM transfer") == HEROES
    assert await stage.value("SELECT count(*) FROM team") == 1 + HEROES + 2 * IMPORTED
    assert await stage.value("SELECT count(DISTINCT name) FROM team") == 1 + HEROES + 2 * IMPORTED
    assert await done_by(stage, old) > 0
    assert await done_by(stage, new) > 0
    assert [one.terminate() for one in (old, new)] == [0, 0]


async def enqueue_transfers_and_imports(producer: Producer, folder: Path) -> None:
    """Transfers, inserts of one row, and two imports of many chunks."""
    for start in (0, IMPORTED):
        path = folder / f"teams-{start}.csv"
        names = (f"Import {n}\n" for n in range(start, start + IMPORTED))
        path.write_text("name\n" + "".join(names))
        await enqueue_file(producer, path, {"table": "team", "chunk_rows": 100})
    for n in range(HEROES):
        jobs: list[Payload] = [
            TransferHeroes(hero_ids=[n + 1], to_team_id=1),
            InsertRows(table="team", rows=[{"name": f"Team {n}"}]),
        ]
        for payload in jobs:
            await producer.enqueue(payload)


async def done_by(stage: Stage, worker: WorkerProcess) -> int:
    number: int = await stage.value(
        "SELECT count(*) FROM bulwark.job JOIN bulwark.worker ON worker.id = job.worker_id "
        "WHERE worker.pid = $1",
        worker.pid,
    )
    return number


async def test_the_program_before_changes_purges_and_rotates_on_the_schema_of_this_one(
    start: Start,
    old_env: Mapping[str, str],
    stage: Stage,
    producer: Producer,
    connection: asyncpg.Connection,
    database_url: str,
) -> None:
    await stage.execute(LONG_DELETED)
    months = [await make_month(connection, one, LONG_AGO) for one in ROTATED]
    await stage.value(STRAY, id_at(NO_MONTH))
    old = start(old_env)
    await until_started(stage, old)
    payloads: list[Payload] = [
        UpdateRows(table="hero", keys=[1, 2, 99], values={"age": 40}, chunk_rows=1),
        SoftDeleteRows(table="hero", keys=[2, 3], chunk_rows=1),
        PurgeDeletedRows(tables=["hero"], retention_days={"hero": 30}),
        MaintainLedger(retention_days=dict.fromkeys(ROTATED, 30)),
    ]
    outcomes: list[Any] = []
    for payload in payloads:  # of one another's rows, so one after the other
        job_id = (await producer.enqueue(payload)).job_id
        outcomes.append((await stage.becomes(job_id, "succeeded"))["outcome"])
    updated, deleted, purged, kept = map(json.loads, outcomes)
    assert updated["verdicts"] == {"updated": 2, "missing": 1}
    assert deleted["verdicts"] == {"deleted": 2}
    assert purged["verdicts"] == {"purged": 2}
    assert {name: kept[name] for name in ROTATED} == {
        name: {"dropped": [month], "strays": int(name == "audit")}
        for name, month in zip(ROTATED, months, strict=True)
    }
    assert await stage.rows("SELECT id, age, deleted_at IS NULL FROM hero ORDER BY id") == [
        (1, 40, True),
        (2, 40, False),
        (3, None, False),
    ]
    rotated = {
        (one.year, one.month) for (one,) in await stage.rows("SELECT month FROM bulwark.rotation")
    }
    assert rotated == {(one.year, one.month) for one in (LONG_AGO, NO_MONTH)}
    assert await done_by(stage, old) == len(payloads)
    assert await check_invariants(database_url) == Losses()


# Jobs of a kind that only one of them knows


async def heard_in_vain(worker: WorkerProcess, job_id: UUID) -> None:
    async def heard() -> bool:
        return any(
            one["event"] == "job.unknown" and one["arq_id"].startswith(str(job_id))
            for one in worker.events()
        )

    await until(heard, "the older worker has heard of the job", 30.0)


async def test_a_job_of_an_unknown_kind_waits_for_a_worker_that_knows_it_and_runs_soon_then(
    start: Start,
    old_env: Mapping[str, str],
    new_env: Mapping[str, str],
    stage: Stage,
    producer: Producer,
) -> None:
    old = start(old_env)
    await until_started(stage, old)
    ids = [(await producer.enqueue(ActOut(note=str(n)))).job_id for n in range(20)]
    for job_id in ids:
        await heard_in_vain(old, job_id)
    await stage.value(PUT_OFF)
    assert await stage.value("SELECT count(*) FROM bulwark.job WHERE state = 'queued'") == 20
    assert await stage.value("SELECT sum(attempt + crashes) FROM bulwark.job") == 0
    new = start(new_env)
    await until_started(stage, new)
    started_s = time.monotonic()
    for job_id in ids:
        await stage.becomes(job_id, "succeeded", SOON_S)
    assert time.monotonic() - started_s < SOON_S
    assert sorted(await stage.notes(), key=int) == [str(n) for n in range(20)]
    assert await done_by(stage, new) == 20


async def test_a_plain_message_of_an_unknown_job_waits_for_a_worker_that_knows_it(
    start: Start,
    old_env: Mapping[str, str],
    new_env: Mapping[str, str],
    stage: Stage,
    client: ArqRedis,
) -> None:
    """Some are heard before the newer worker is there, some when both are."""
    old = start(old_env)
    await until_started(stage, old)
    for n in range(20):
        await client.enqueue_job("act_out", {"note": str(n)})
    await all_parked(stage, 20)
    new = start(new_env)
    await until_started(stage, new)
    sent = 20
    while await stage.value("SELECT count(*) FROM bulwark.parked") == 20:
        await client.enqueue_job("act_out", {"note": str(sent)})
        sent += 1
        await all_taken_in(stage, sent)

    async def done() -> bool:
        return len(await stage.notes()) >= sent

    await until(done, "all is done", SOON_S)
    await until_all_ended(stage)
    assert sorted(await stage.notes(), key=int) == [str(n) for n in range(sent)]
    assert await stage.value("SELECT count(*) FROM bulwark.job") == sent
    assert await stage.value("SELECT count(*) FROM bulwark.parked WHERE job_id IS NULL") == 0
    assert await done_by(stage, new) == sent


async def all_parked(stage: Stage, messages: int) -> None:
    async def are() -> bool:
        return bool(await stage.value("SELECT count(*) FROM bulwark.parked") == messages)

    await until(are, "all messages are parked")


async def all_taken_in(stage: Stage, messages: int) -> None:
    """Each as a job, or parked and not a job yet."""
    query = (
        "SELECT (SELECT count(*) FROM bulwark.job)"
        " + (SELECT count(*) FROM bulwark.parked WHERE job_id IS NULL)"
    )

    async def are() -> bool:
        return bool(await stage.value(query) == messages)

    await until(are, "all messages are taken in")


async def test_beside_a_worker_that_does_not_know_them_jobs_do_not_wait_for_minutes(
    start: Start,
    old_env: Mapping[str, str],
    new_env: Mapping[str, str],
    stage: Stage,
    producer: Producer,
) -> None:
    old, new = start(old_env), start(new_env)
    for worker in (old, new):
        await until_started(stage, worker)
    ids: list[UUID] = []
    while not any(one["event"] == "job.unknown" for one in old.events()):
        ids.append((await producer.enqueue(ActOut(note=str(len(ids))))).job_id)
        await stage.value(PUT_OFF)
    for job_id in ids:
        await stage.becomes(job_id, "succeeded", SOON_S)
    assert sorted(await stage.notes(), key=int) == [str(n) for n in range(len(ids))]
    assert await done_by(stage, old) == 0


# Migrations only add

DOLLAR_QUOTED = re.compile(r"(\$\w*\$).*?\1", re.DOTALL)
TAKES_AWAY = (
    r"\bDROP\b",
    r"\bRENAME\b",
    r"\bALTER\s+(COLUMN\s+)?\S+\s+(SET\s+DATA\s+)?TYPE\b",
    r"\bSET\s+NOT\s+NULL\b",
    r"\bSET\s+SCHEMA\b",
    r"\bTRUNCATE\b",
    r"\bADD\s+(COLUMN\s+)?(?!CONSTRAINT)(?:(?!\bDEFAULT\b|\bADD\b).)*\bNOT\s+NULL\b(?!.*\bDEFAULT\b)",
)


def what_takes_away(sql: str) -> list[str]:
    """The statements after which a program of before would fail, outside of function bodies.

    What is done to a table that these very migrations have made is nothing to that program.
    """
    bare = re.sub(r"--[^\n]*", "", DOLLAR_QUOTED.sub("''", sql))
    made = "|".join(map(re.escape, re.findall(r"CREATE TABLE (\S+)", bare))) or "(?!)"
    statements = [
        " ".join(one.split())
        for one in bare.split(";")
        if not re.match(rf"\s*ALTER TABLE ({made})\s", one)
    ]
    return [
        one
        for one in statements
        if any(re.search(pattern, one, re.IGNORECASE) for pattern in TAKES_AWAY)
        and not re.match(r"CREATE ", one, re.IGNORECASE)
    ]


def sql_of_migrations(after: str) -> str:
    config = migrations.configuration("postgresql://unused/unused")
    config.output_buffer = io.StringIO()
    command.upgrade(config, f"{after}:head", sql=True)
    return config.output_buffer.getvalue()


def test_migrations_after_0007_only_add() -> None:
    sql = sql_of_migrations(FIRST_ADDITIVE)
    assert "CREATE TABLE bulwark.kind" in sql
    assert what_takes_away(sql) == []


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE hero DROP COLUMN age",
        "drop table hero",
        "DROP INDEX CONCURRENTLY ix_hero",
        "ALTER TABLE hero RENAME COLUMN age TO years",
        "ALTER TABLE hero RENAME TO heroes",
        "ALTER TABLE hero ALTER COLUMN age TYPE bigint",
        "ALTER TABLE hero ALTER age SET DATA TYPE bigint",
        "ALTER TABLE hero ALTER COLUMN age SET NOT NULL",
        "ALTER TABLE hero ADD COLUMN rank integer NOT NULL",
        "ALTER TABLE hero ADD rank integer\n NOT NULL",
        "ALTER TABLE hero SET SCHEMA old",
        "CREATE TABLE a (b text); ALTER TABLE hero DROP COLUMN age",
    ],
)
def test_a_migration_that_takes_away_is_found(statement: str) -> None:
    assert len(what_takes_away(f"BEGIN;\n\n{statement};\n\nCOMMIT;")) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE a (b text NOT NULL)",
        "ALTER TABLE hero ADD COLUMN rank integer",
        "ALTER TABLE hero ADD COLUMN rank integer DEFAULT 0 NOT NULL",
        "ALTER TABLE hero ADD COLUMN rank integer NOT NULL DEFAULT 0",
        "ALTER TABLE hero ALTER COLUMN age SET DEFAULT 1",
        "CREATE OR REPLACE FUNCTION f() RETURNS void LANGUAGE sql AS $$ DROP TABLE a; $$",
        "UPDATE alembic_version SET version_num='0009' WHERE alembic_version.version_num = '0007'",
    ],
)
def test_a_migration_that_adds_is_not_found(statement: str) -> None:
    assert what_takes_away(f"BEGIN;\n\n{statement};\n\nCOMMIT;") == []
