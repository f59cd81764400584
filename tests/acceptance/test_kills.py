"""The promise under fire: kills, pauses and a wiped Redis change nothing about the outcome."""

import csv
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from pydantic import JsonValue
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.engine import PoolProfile, create_engine, make_sessions
from jobs._bell import Bell
from jobs._discovery import discover_jobs
from jobs._producer import Producer
from jobs._spooling import enqueue_file
from jobs.insert_rows import InsertRows
from tests.workers import Start, WorkerProcess, environment, until, workers
from worker.testing.databases import Databases
from worker.testing.servers import RedisDatabases

pytestmark = pytest.mark.once

ROWS = 200_000
TEAMS = 500
CHUNK_ROWS = 1_000
KILLS = 10
FLUSHES = (3, 7)
RECOVERY_S = 25.0


def write_heroes(path: Path) -> None:
    """Heroes with one bad row in a hundred, of four kinds."""
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["name", "age", "email", "external_id", "club"])
        for n in range(ROWS):
            row = [f"Hero {n}", n % 90, f"hero{n}@example.org", f"H{n}", f"Team {n % TEAMS}"]
            match n % 400:
                case 100:
                    row[1] = -1
                case 200:
                    row[4] = "Nowhere"
                case 300:
                    row[3] = "H0"
                case 399:
                    row.append("one too many")
            out.writerow(row)


@dataclass
class Site:
    """A database with its teams, a Redis, and the import that is to be disturbed."""

    sessions: async_sessionmaker[AsyncSession]
    env: dict[str, str]
    redis: "Redis"
    producer: Producer

    async def scalar(self, sql: str, **bind: Any) -> Any:
        async with self.sessions() as session:
            return (await session.execute(sa.text(sql), bind)).scalar()

    async def rows(self, sql: str, **bind: Any) -> list[tuple[Any, ...]]:
        async with self.sessions() as session:
            return [tuple(row) for row in await session.execute(sa.text(sql), bind)]

    async def state(self, job_id: UUID) -> str:
        state: str = await self.scalar("SELECT state FROM bulwark.job WHERE id = :id", id=job_id)
        return state

    async def chunks(self, job_id: UUID) -> int:
        count: int = await self.scalar(
            "SELECT count(*) FROM bulwark.chunk WHERE job_id = :id AND chunk_no > 0", id=job_id
        )
        return count

    async def enqueue(self, path: Path) -> UUID:
        teams: list[dict[str, JsonValue]] = [{"name": f"Team {n}"} for n in range(TEAMS)]
        await self.producer.enqueue(InsertRows(table="team", rows=teams))
        await until(self._has_teams, "the teams are there")
        request = {"table": "hero", "map": {"club": "team.name"}, "chunk_rows": CHUNK_ROWS}
        return (await enqueue_file(self.producer, path, request, actor="tester")).job_id

    async def _has_teams(self) -> bool:
        return bool(await self.scalar("SELECT count(*) FROM team") == TEAMS)

    async def result(self, job_id: UUID) -> dict[str, Any]:
        """All that the import has left behind, without what chance decides: ids and times."""
        return {
            "job": await self.rows(
                "SELECT state, reason, error, outcome, attempt FROM bulwark.job WHERE id = :id",
                id=job_id,
            ),
            "heroes": await self.rows(
                "SELECT h.name, age, email, external_id, t.name, h.version FROM hero AS h "
                "JOIN team AS t ON t.id = team_id ORDER BY external_id"
            ),
            "chunks": await self.rows(
                "SELECT chunk_no, first_row, rows, filtered, start_byte, end_byte, first_line, "
                "next_line, counts, detail FROM bulwark.chunk WHERE job_id = :id ORDER BY 1",
                id=job_id,
            ),
            "verdicts": await self.rows(
                'SELECT row_no, chunk_no, line, verdict, code, "column", message, raw '
                "FROM bulwark.verdict WHERE job_id = :id ORDER BY 1",
                id=job_id,
            ),
            "audit": await self.rows(
                "SELECT chunk_no, entry_no, kind, actor, action, table_name, rows, ("
                "SELECT count(*) FROM hero, jsonb_array_elements(keys -> 'ranges') AS r "
                "WHERE hero.id BETWEEN (r ->> 0)::bigint AND (r ->> 1)::bigint) "
                "FROM bulwark.audit WHERE job_id = :id ORDER BY 1, 2",
                id=job_id,
            ),
        }


@pytest.fixture
def site_urls(bulwark_databases: Databases) -> Iterator[list[str]]:
    """Two databases and a place in Redis for each."""
    with bulwark_databases.fresh() as one, bulwark_databases.fresh() as other:
        yield [one, other]


@pytest.fixture
async def sites(
    bulwark_redis_databases: RedisDatabases, site_urls: list[str]
) -> AsyncIterator[list[Site]]:
    """Two sites alike: one is disturbed, one is left in peace."""
    async with AsyncExitStack() as stack:
        made = []
        for url in site_urls:
            redis_url = bulwark_redis_databases.next()
            engine = create_engine(url, profile=PoolProfile.LIGHT, application_name="site")
            stack.push_async_callback(engine.dispose)
            redis = await stack.enter_async_context(Redis.from_url(redis_url))
            sessions = make_sessions(engine)
            producer = Producer(sessions, discover_jobs(), Bell(redis))
            made.append(Site(sessions, environment(url, redis_url), redis, producer))
        yield made


async def test_kills_pauses_and_flushes_leave_the_same_rows_verdicts_and_audit(
    sites: list[Site], tmp_path: Path
) -> None:
    disturbed, calm = sites
    path = tmp_path / "heroes.csv"
    write_heroes(path)
    with workers(tmp_path) as start:
        expected = await _undisturbed(calm, path, start)
        job_id = await _disturbed(disturbed, path, start)
    assert await disturbed.state(job_id) == "succeeded"
    assert await disturbed.result(job_id) == expected
    counts = expected["job"][0][3]["verdicts"]
    assert counts == {"inserted": ROWS - ROWS // 100, "rejected": ROWS // 100}
    assert all(entry[6] == entry[7] for entry in expected["audit"])


async def _undisturbed(site: Site, path: Path, start: Start) -> dict[str, Any]:
    worker = start(site.env)
    job_id = await site.enqueue(path)
    await until(lambda: _ended(site, job_id), "the undisturbed import has ended", 120)
    assert worker.terminate() == 0
    return await site.result(job_id)


async def _ended(site: Site, job_id: UUID) -> bool:
    return await site.state(job_id) in ("succeeded", "failed")


async def _disturbed(site: Site, path: Path, start: Start) -> UUID:
    moments, recoveries_s = random.Random(20261121), []
    worker = start(site.env)
    job_id = await site.enqueue(path)
    for kill in range(1, KILLS + 1):
        more = 0 if kill == 1 else moments.randint(1, 12)
        await _more_chunks(site, job_id, more)
        spent_s = time.perf_counter() + moments.uniform(0, 0.05)
        while time.perf_counter() < spent_s:
            pass  # a moment within whatever the worker is doing
        worker.kill()
        killed_s = time.monotonic()
        assert await site.state(job_id) == "running"
        claim_id = await site.scalar("SELECT claim_id FROM bulwark.job WHERE id = :id", id=job_id)
        worker = start(site.env)
        if kill in FLUSHES:
            taken_back = partial(_is_taken_back, site, job_id, claim_id)
            await until(taken_back, "the job is taken back")
            await site.redis.flushdb()
        await _more_chunks(site, job_id, 1)
        recoveries_s.append(time.monotonic() - killed_s)
    *_, second_worst_s, _ = sorted(recoveries_s)  # one may fall into a stall of the machine
    assert second_worst_s < RECOVERY_S
    await _paused_until_another_has_finished(site, job_id, worker, start)
    return job_id


async def _is_taken_back(site: Site, job_id: UUID, claim_id: UUID) -> bool:
    """Whether the job waits, or somebody else was quick to have it."""
    return bool(
        await site.scalar(
            "SELECT state = 'queued' OR claim_id <> :claim FROM bulwark.job WHERE id = :id",
            id=job_id,
            claim=claim_id,
        )
    )


async def _more_chunks(site: Site, job_id: UUID, more: int) -> None:
    """Wait until the job runs and that many chunks more than now are committed."""
    before = await site.chunks(job_id)

    async def committed() -> bool:
        running = await site.state(job_id) == "running"
        return running and await site.chunks(job_id) >= before + more

    await until(committed, f"{more} more chunks are committed")


async def _paused_until_another_has_finished(
    site: Site, job_id: UUID, paused: WorkerProcess, start: Start
) -> None:
    await _more_chunks(site, job_id, 3)
    paused.signal(signal.SIGSTOP)
    other = start(site.env)
    await until(lambda: _ended(site, job_id), "the other worker has finished", 90)
    paused.signal(signal.SIGCONT)

    async def started_anew() -> bool:
        count = await site.scalar(
            "SELECT count(*) FROM bulwark.worker WHERE pid = :pid", pid=paused.pid
        )
        return bool(count == 2)

    await until(started_anew, "the resumed worker noticed that it was lost, and began anew")
    assert paused.terminate() == 0
    assert other.terminate() == 0
