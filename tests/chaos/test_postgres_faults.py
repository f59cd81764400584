"""PostgreSQL is restarted, filled, blocked, replaced or away; workers mostly have defaults."""

import asyncio
import os
import random
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
from pydantic import JsonValue
from sqlalchemy import make_url
from structlog.testing import capture_logs

from db.engine import PoolProfile, create_engine, make_sessions
from db.migrations import upgrade
from db.retry import DATABASE_ERRORS
from jobs import Payload, Producer, discover_jobs
from jobs._bell import Bell
from jobs.insert_rows import InsertRows
from tests.chaos.conftest import Provoked
from tests.invariants import check_invariants
from tests.outages import accepted_at_last, all_connections_taken
from tests.own_servers import OwnPostgres, own_postgres
from tests.proxy import Cut, Road, hushable, proxied
from tests.sample_jobs.act_out import NOTES, ActOut
from tests.sample_jobs.write_notes import WriteNotes
from tests.stage import SAMPLE_JOBS, Stage, connected
from tests.workers import Start, WorkerProcess, environment, until
from worker.embedded import EmbeddedPostgres, embedded_postgres
from worker.embedded.home import give_to_postgres
from worker.redis_pool import make_redis

ROWS = 40
A_SHORT_WHILE_S = 10.0
BLOCK_BYTES = 4096


@dataclass
class Site:
    """Jobs on one database, to which workers, the producer and the test have ways of their own."""

    url: str
    producer: Producer
    start: Start
    env: dict[str, str]
    workers: list[WorkerProcess] = field(default_factory=list)
    accepted: int = 0
    notes: int = 0
    rows: int = 0
    recovery_s: list[float] = field(default_factory=list)

    def work(self) -> WorkerProcess:
        self.workers.append(self.start(self.env))
        return self.workers[-1]

    async def enqueue(self, jobs: int) -> None:
        """By turns a bulk insert in chunks, a job of one transaction, and one of many."""
        for _ in range(jobs):
            n = self.accepted
            payloads: list[Payload] = [
                InsertRows(
                    table="team", chunk_rows=5, rows=[{"name": f"T{n}-{i}"} for i in range(ROWS)]
                ),
                ActOut(note=f"{n}"),
                WriteNotes(chunks=3),
            ]
            await self.producer.enqueue(payloads[n % 3])
            self.rows += ROWS if n % 3 == 0 else 0
            self.notes += (0, 1, 3)[n % 3]
            self.accepted += 1

    async def value(self, sql: str, *arguments: object) -> object:
        """Through a connection of its own; None while PostgreSQL does not answer."""
        with suppress(*DATABASE_ERRORS):
            async with asyncio.timeout(5), connected(self.url) as connection:
                return await connection.fetchval(sql, *arguments)
        return None

    async def recovers(self, since_s: float, *, attempts: int = 0) -> None:
        """Return when all jobs have succeeded, without having spent more attempts than so many."""

        async def all_ended() -> bool:
            done = await self.value(
                "SELECT count(*) FROM bulwark.job WHERE state = 'succeeded' AND attempt <= $1",
                attempts,
            )
            return done == self.accepted

        await until(all_ended, f"{self.accepted} jobs have succeeded: {self.log()}")
        self.recovery_s.append(time.monotonic() - since_s)

    def log(self) -> str:
        return "\n".join(one.log.read_text()[-1500:] for one in self.workers)

    def told(self) -> list[str]:
        return [one["event"] for worker in self.workers for one in worker.events()]

    async def until_said(self, event: str, times: int = 1) -> None:
        async def said() -> bool:
            return self.told().count(event) >= times

        await until(said, f"a worker has said {event} {times} times")

    async def check(self, provoked: Provoked, fault: str, times: int) -> None:
        notes, rows = await self.value("SELECT count(*) FROM note"), 0
        if self.rows:
            rows = int(str(await self.value("SELECT count(*) FROM team")))
        codes = await asyncio.gather(*(asyncio.to_thread(one.terminate) for one in self.workers))
        losses = await check_invariants(self.url)
        more = int(str(notes)) - self.notes + rows - self.rows
        provoked(
            fault,
            times=times,
            jobs=self.accepted,
            lost=max(-more, 0) + losses.lost,
            doubled=max(more, 0) + losses.doubled,
            recovery_s=self.recovery_s,
        )
        assert not losses
        assert await self.value("SELECT count(*) FROM bulwark.job WHERE crashes > 0") == 0
        assert set(codes) == {0}


@asynccontextmanager
async def site_on(
    url: str, redis_url: str, start: Start, way: str | None = None
) -> AsyncIterator[Site]:
    """Workers and producer take the `way`, which leads to the same database as the URL."""
    async with connected(url) as connection:
        await connection.execute(NOTES)
    way = way or url
    engine = create_engine(way, profile=PoolProfile.LIGHT, application_name="producer")
    settings = {"job_modules": ",".join(SAMPLE_JOBS), "log_format": "json"}
    try:
        async with make_redis(redis_url, 1.0) as redis:
            producer = Producer(make_sessions(engine), discover_jobs(SAMPLE_JOBS), Bell(redis))
            yield Site(url, producer, start, environment(way, redis_url, **settings))
    finally:
        await engine.dispose()


@pytest.fixture
def postgres() -> Iterator[OwnPostgres]:
    with own_postgres(durable=True) as postgres:
        upgrade(postgres.url)
        yield postgres


@pytest.fixture
async def site(postgres: OwnPostgres, redis_url: str, start: Start) -> AsyncIterator[Site]:
    async with site_on(postgres.url, redis_url, start) as site:
        yield site


async def test_terminated_backends_cost_nothing(
    database_url: str, redis_url: str, start: Start, provoked: Provoked
) -> None:
    chance = random.Random(4)
    async with site_on(database_url, redis_url, start) as site, connected(database_url) as eye:
        site.work()
        site.work()
        await site.until_said("worker.started", 2)
        times = 0
        for _ in range(20):
            await site.enqueue(6)
            pids = await eye.fetch(
                "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'bulwark %' "
                "AND datname = current_database() ORDER BY pid"
            )
            for (pid,) in chance.sample(pids, len(pids) // 2):
                times += await eye.fetchval("SELECT pg_terminate_backend($1)::int", pid)
        await site.recovers(time.monotonic())
        await site.check(provoked, "PostgreSQL: terminated backends", times)


async def test_connections_that_break_at_commit_cost_nothing(
    database_url: str, redis_url: str, start: Start, provoked: Provoked
) -> None:
    async with (
        proxied(database_url) as (proxy, way),
        site_on(database_url, redis_url, start, way) as site,
        connected(database_url) as eye,
    ):
        worker = site.work()
        await site.until_said("worker.started")
        for _ in range(4):
            proxy.arm(Cut.QUESTION, Cut.ANSWER, Cut.CLIENT)
            await site.enqueue(6)
        since_s = time.monotonic()
        await site.recovers(since_s)
        proxy.hold(b"COMMIT;\x00")
        enqueueing = asyncio.create_task(site.enqueue(6))  # its COMMIT may be the one that is held
        await proxy.holds.wait()
        ended = await eye.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        proxy.release()
        since_s = time.monotonic()
        await enqueueing
        await site.recovers(since_s)
        assert worker.running
        times = len(proxy.cuts) + len(ended)
        await site.check(provoked, "PostgreSQL: connections broken at COMMIT", times)


@pytest.mark.once
async def test_jobs_go_on_after_postgresql_was_restarted(
    site: Site, postgres: OwnPostgres, provoked: Provoked
) -> None:
    modes: list[Literal["fast", "immediate"]] = ["fast", "immediate", "fast", "immediate"]
    site.work()
    site.work()
    await site.until_said("worker.started", 2)
    for mode in modes:
        await site.enqueue(12)
        await asyncio.to_thread(postgres.stop, mode)
        await asyncio.to_thread(postgres.start)
        since_s = time.monotonic()
        await site.enqueue(6)
        await site.recovers(since_s)
    await site.check(provoked, "PostgreSQL: fast and immediate restart", len(modes))


@pytest.mark.once
@pytest.mark.parametrize(
    "seconds",
    [5.0, pytest.param(60.0, marks=pytest.mark.chaos)],
)
async def test_an_absence_of_postgresql_poisons_nothing_and_is_told_once(
    site: Site, postgres: OwnPostgres, provoked: Provoked, seconds: float
) -> None:
    """A relay that is just at work may bear a short absence, and tell nothing."""
    site.env |= {"BULWARK_BEAT_INTERVAL_S": "3"}
    site.work()
    site.work()
    await site.until_said("worker.started", 2)
    await site.enqueue(30)
    await asyncio.to_thread(postgres.stop, "immediate")
    await asyncio.sleep(seconds)  # so long it is away
    await asyncio.to_thread(postgres.start)
    since_s = time.monotonic()
    await site.enqueue(6)
    await site.recovers(since_s)
    await site.until_said("beat.back", 2)
    for worker in site.workers:

        async def relay_is_back(worker: WorkerProcess = worker) -> bool:
            told = worker.told()
            return told.count("relay.failed") == told.count("relay.back")

        await until(relay_is_back, "the relay is back")
        told = worker.told()
        assert (told.count("beat.missed"), told.count("beat.back")) == (1, 1)
        assert (seconds > A_SHORT_WHILE_S) <= told.count("relay.failed") <= 1
    await site.check(provoked, f"PostgreSQL: away for {seconds:g} s", 1)


@pytest.mark.once
async def test_workers_and_producers_wait_while_others_have_all_connections(
    site: Site, provoked: Provoked
) -> None:
    site.work()
    await site.until_said("worker.started")
    await site.enqueue(3)
    await site.recovers(time.monotonic())

    async def enqueue_six() -> None:
        accept = partial(accepted_at_last, partial(site.enqueue, 1))
        for _ in range(6):
            await until(accept, "a job is accepted")

    async with all_connections_taken(site.url):
        enqueueing = asyncio.create_task(enqueue_six())
        with capture_logs() as logs:
            await site.until_said("beat.missed")

            async def told() -> bool:
                return any(one["event"] == "transaction.replayed" for one in logs)

            await until(told, "the producer tries again")
    since_s = time.monotonic()
    await enqueueing
    await site.recovers(since_s)
    await site.check(provoked, "PostgreSQL: no connection left", 1)


async def test_a_job_waits_for_a_table_that_another_session_has_locked(
    database_url: str, redis_url: str, start: Start, provoked: Provoked
) -> None:
    async with site_on(database_url, redis_url, start) as site, connected(database_url) as other:
        site.work()
        await other.execute("BEGIN; LOCK TABLE team, note IN ACCESS EXCLUSIVE MODE")
        await site.enqueue(3)
        await site.until_said("transaction.replayed", 3)
        faults = {
            one["fault"]
            for one in site.workers[0].events()
            if one["event"] == "transaction.replayed"
        }
        assert faults == {"contention"}
        await other.execute("COMMIT")
        await site.recovers(time.monotonic())
        await site.check(provoked, "PostgreSQL: lock timeout", 3)


SLEEPING = """
    CREATE FUNCTION sleep_on() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN PERFORM pg_sleep(60); RETURN NULL; END';
    CREATE TRIGGER slow BEFORE INSERT ON team EXECUTE FUNCTION sleep_on();
    CREATE TRIGGER slow BEFORE INSERT ON note EXECUTE FUNCTION sleep_on();
    CREATE FUNCTION be_quick() RETURNS trigger LANGUAGE plpgsql AS
        $$BEGIN PERFORM set_config('statement_timeout', '500', true); RETURN NULL; END$$;
    CREATE TRIGGER quick AFTER INSERT ON bulwark.chunk EXECUTE FUNCTION be_quick();
"""
"""A chunk's statements behind its receipt may take 0.5 s in place of the fence's ten minutes."""
AWAKE = """
    DROP TRIGGER slow ON team; DROP TRIGGER slow ON note; DROP TRIGGER quick ON bulwark.chunk;
    DROP FUNCTION sleep_on, be_quick;
    UPDATE bulwark.job SET timeout_s = 60 WHERE kind = 'act_out'
"""


async def test_a_statement_that_takes_too_long_costs_an_attempt_and_its_job_is_tried_again(
    database_url: str, redis_url: str, start: Start, provoked: Provoked
) -> None:
    """Chunks meet PostgreSQL's limit; a job of one transaction its own, which began before that."""
    async with site_on(database_url, redis_url, start) as site, connected(database_url) as other:
        await other.execute(SLEEPING)
        await site.enqueue(3)
        await other.execute("UPDATE bulwark.job SET timeout_s = 1 WHERE kind = 'act_out'")
        await other.execute("UPDATE bulwark.job SET max_attempts = 1000")
        site.work()
        spent = "SELECT kind, error FROM bulwark.job WHERE attempt > 0"

        async def all_have_failed() -> dict[str, str] | None:
            errors = dict(await other.fetch(spent))
            return errors if len(errors) == site.accepted else None

        errors = await until(all_have_failed, "each job has spent an attempt")
        await other.execute(AWAKE)
        assert "ran longer than 1 s" in errors.pop("act_out")
        assert {kind for kind, text in errors.items() if "statement timeout" in text} == {*errors}
        await site.recovers(time.monotonic(), attempts=1000)
        assert await other.fetchval("SELECT min(attempt) FROM bulwark.job") > 0
        await site.check(provoked, "PostgreSQL: statement timeout", site.accepted)


@pytest.mark.once
async def test_connections_that_have_become_black_holes_are_given_up(
    database_url: str, redis_url: str, start: Start, provoked: Provoked
) -> None:
    """Both ends stay open, and take everything: only a clock of the worker's own can tell."""
    async with site_on(database_url, redis_url, start) as site:
        async with hushable(database_url) as (wire, way):
            site.env |= {"BULWARK_DATABASE_URL": way}
            site.work()
            await site.enqueue(3)
            await site.recovers(time.monotonic())
            wire.hush()
            wire.mend()
            since_s = time.monotonic()
            await site.enqueue(3)
            await site.recovers(since_s)
            (worker,) = site.workers
            assert await asyncio.to_thread(worker.terminate) == 0
        await site.check(provoked, "PostgreSQL: black-holed connections", 1)


@pytest.mark.once
async def test_time_that_runs_out_while_postgresql_is_out_of_reach_costs_no_attempt(
    database_url: str, redis_url: str, start: Start, provoked: Provoked
) -> None:
    async with site_on(database_url, redis_url, start) as site, connected(database_url) as eye:
        stage = Stage(eye)
        await stage.close_gate()
        async with hushable(database_url) as (wire, way):
            site.env |= {"BULWARK_DATABASE_URL": way, "BULWARK_BEAT_INTERVAL_S": "0.5"}
            site.work()
            await site.producer.enqueue(ActOut(gate=True), timeout_s=10, attempts=1)
            site.accepted = site.notes = 1
            await stage.somebody_at_gate()
            wire.hush()
            wire.mend()
            since_s = time.monotonic()
            await site.until_said("beat.missed")
            await stage.open_gate()
            await site.recovers(since_s)
            assert site.told().count("job.retried") == 1
            assert await asyncio.to_thread(site.workers[0].terminate) == 0
        await site.check(provoked, "PostgreSQL: black-holed connection of a job", 1)


@pytest.mark.once
async def test_workers_and_producers_follow_a_fail_over_at_the_same_address(
    postgres: OwnPostgres, redis_url: str, start: Start, provoked: Provoked
) -> None:
    """Another server goes on with the files of the first, which has died."""
    if not isinstance(postgres, EmbeddedPostgres):
        pytest.skip("the files of a server in a container are not at hand")
    road = Road(postgres.url)
    await road.open()
    async with site_on(postgres.url, redis_url, start, road.url) as site:
        site.work()
        await site.until_said("worker.started")
        await site.enqueue(30)
        await asyncio.to_thread(postgres.stop, "immediate")
        with embedded_postgres(durable=True) as other:
            await asyncio.to_thread(take_over, postgres, other)
            road.lead_to(other.url)
            site.url = other.url
            since_s = time.monotonic()
            await site.enqueue(6)
            await site.recovers(since_s)
            await site.check(provoked, "PostgreSQL: fail-over to another server", 1)
        await road.close()


def take_over(dead: EmbeddedPostgres, other: EmbeddedPostgres) -> None:
    """Start the other server with the files of the dead one."""
    other.stop()
    shutil.rmtree(other.folder)
    shutil.copytree(dead.folder, other.folder)
    (other.folder / "postmaster.pid").unlink(missing_ok=True)
    for one in [other.folder, *other.folder.rglob("*")]:
        give_to_postgres(one)
    other.start()


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system that is soon full, for PostgreSQL's user."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0777", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk has to be mounted, which takes the rights of root")
    give_to_postgres(folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, spare_bytes: int) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        for _ in range((shutil.disk_usage(disk).free - spare_bytes) // BLOCK_BYTES):
            file.write(bytes(BLOCK_BYTES))
    return ballast


async def enqueue_much(site: Site) -> None:
    """Jobs that write more than there is room for; the producer, too, may find the disk full."""
    for n in range(6):
        rows: list[dict[str, JsonValue]] = [
            {"name": f"{n}-{i} {secrets.token_hex(60)}"} for i in range(2000)
        ]
        accept = partial(
            site.producer.enqueue, InsertRows(table="team", rows=rows), idempotency_key=f"much {n}"
        )
        await until(partial(accepted_at_last, accept), "the job is accepted")
        site.accepted += 1
        site.rows += len(rows)


@pytest.fixture
def disk() -> Iterator[Path]:
    """Not in the test's own folder, into which PostgreSQL's user may not look."""
    with tempfile.TemporaryDirectory(prefix="bulwark-disk-") as folder:
        Path(folder).chmod(0o755)
        with small_disk(Path(folder) / "disk", 64) as disk:
            yield disk


@pytest.mark.once
async def test_jobs_wait_while_the_disk_is_full(
    disk: Path, redis_url: str, start: Start, provoked: Provoked
) -> None:
    with own_postgres(durable=True) as postgres:
        if not isinstance(postgres, EmbeddedPostgres):
            pytest.skip("a server in a container does not see this disk")
        async with connected(postgres.url) as connection:
            await connection.execute(f"CREATE TABLESPACE small LOCATION '{disk}'")
            await connection.execute("CREATE DATABASE crowded TABLESPACE small")
        url = make_url(postgres.url).set(database="crowded")
        crowded = url.render_as_string(hide_password=False)
        await asyncio.to_thread(upgrade, crowded)
        async with site_on(crowded, redis_url, start) as site:
            site.work()
            await site.until_said("worker.started")
            ballast = fill(disk, spare_bytes=1_000_000)
            enqueueing = asyncio.create_task(enqueue_much(site))

            async def out_of_room() -> bool:
                return any(one.get("sqlstate") == "53100" for one in site.workers[0].events())

            await until(out_of_room, "the worker has found the disk full")
            ballast.unlink()
            since_s = time.monotonic()
            await enqueueing
            await site.recovers(since_s)
            await site.check(provoked, "PostgreSQL: disk full", 1)
