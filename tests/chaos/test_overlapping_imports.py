"""Imports that update the same rows at the same time, beside other writers, and through crashes."""

import asyncio
import csv
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from structlog.testing import capture_logs

from jobs.insert_rows import InsertRows
from tests.inprocess import Bench
from tests.stage import connected
from tests.workers import environment, until, workers

KEYS = [f"key {number:04}" for number in range(600)]
THERE = KEYS[::3]
QUICK = {"beat_interval_s": "0.3", "lost_after_s": "1.0", "relay_interval_s": "0.1"}
DEADLOCK = "40P01"
Sessions = async_sessionmaker[AsyncSession]
Audited = dict[tuple[str, str], dict[str, Any]]
"""By file and key, what was there before the file's row."""


@pytest.fixture
async def heroes(connection: asyncpg.Connection) -> None:
    await connection.executemany(
        "INSERT INTO hero (name, external_id) VALUES ($1, $2)",
        [(f"old:{key}", key) for key in THERE],
    )


def file(name: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each key that tells which file it is of."""
    return [{"name": f"{name}:{key}", "external_id": key} for key in keys]


async def import_at_once(
    sessions: Sessions, url: str, **request: Any
) -> tuple[dict[str, UUID], list[dict[str, Any]]]:
    """Import three files, in opposite orders, at the same time; the jobs, and what was replayed."""
    files = {"up": KEYS, "down": KEYS[::-1], "middle": KEYS[300:] + KEYS[:300]}
    with capture_logs() as events:
        ids = await asyncio.gather(
            *(
                Bench(sessions, url).run(InsertRows(table="hero", rows=file(name, keys), **request))
                for name, keys in files.items()
            )
        )
    replayed = [dict(one) for one in events if one["event"] == "transaction.replayed"]
    return dict(zip(files, ids, strict=True)), replayed


async def names(connection: asyncpg.Connection) -> dict[str, str]:
    found = await connection.fetch("SELECT external_id, name FROM hero WHERE deleted_at IS NULL")
    assert len({one["external_id"] for one in found}) == len(found)
    return {one["external_id"]: one["name"] for one in found}


async def audited(connection: asyncpg.Connection, jobs: dict[str, UUID]) -> Audited:
    told: Audited = {}
    for name, job_id in jobs.items():
        lines = await connection.fetch(
            "SELECT external_id, before FROM bulwark.audit AS a JOIN hero AS h "
            "ON h.id = (keys -> 'keys' -> 0 ->> 0)::bigint "
            "WHERE job_id = $1 AND action <> 'insert'",
            job_id,
        )
        told |= {(name, one["external_id"]): json.loads(one["before"]) for one in lines}
        assert len(lines) == sum(1 for file, _ in told if file == name)
    return told


def chain(key: str, name: str | None, changes: Audited) -> list[str]:
    """The files whose rows made the row what it is, from the last to the first."""
    files = []
    while name is not None and name != f"old:{key}":
        files.append(name.split(":")[0])
        assert len(files) <= 3
        name = changes.get((files[-1], key), {}).get("name")
    return files


@pytest.mark.usefixtures("heroes")
@pytest.mark.parametrize("chunk_rows", [37, 1000])
@pytest.mark.parametrize("on_conflict", ["reject", "skip", "update"])
async def test_imports_in_opposite_orders_do_not_deadlock_and_end_as_one_after_another(
    on_conflict: str,
    chunk_rows: int,
    sessions: Sessions,
    database_url: str,
    connection: asyncpg.Connection,
) -> None:
    jobs, replayed = await import_at_once(
        sessions, database_url, on_conflict=on_conflict, chunk_rows=chunk_rows
    )
    bench = Bench(sessions, database_url)
    counts = {name: await bench.counts(job_id) for name, job_id in jobs.items()}
    assert {sum(count.values()) for count in counts.values()} == {len(KEYS)}
    assert sum(count.get("inserted", 0) for count in counts.values()) == len(KEYS) - len(THERE)
    changes = await audited(connection, jobs)
    for key, name in (await names(connection)).items():
        files = chain(key, name, changes)
        assert len(files) == (3 if on_conflict == "update" else key not in THERE)
        assert len(set(files)) == len(files)
    assert [one for one in replayed if one["sqlstate"] == DEADLOCK] == []


WAITING = "SELECT count(*) FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted"


@pytest.mark.usefixtures("heroes")
@pytest.mark.parametrize("on_conflict", ["reject", "skip", "update"])
async def test_two_imports_of_the_same_new_rows_wait_for_each_other_in_no_circle(
    on_conflict: str, sessions: Sessions, database_url: str, connection: asyncpg.Connection
) -> None:
    """A third transaction holds a key in the middle until both imports are stopped by it."""
    new = [f"new {number}" for number in range(9)]
    blocking = connection.transaction()
    await blocking.start()
    await connection.execute("INSERT INTO hero (name, external_id) VALUES ('other', 'new 4')")
    with capture_logs() as events:
        importing = [
            asyncio.create_task(
                Bench(sessions, database_url).run(
                    InsertRows.model_validate(
                        {
                            "table": "hero",
                            "rows": file("file", [there, *keys]),
                            "on_conflict": on_conflict,
                        }
                    )
                )
            )
            for there, keys in ((THERE[0], new), (THERE[1], new[::-1]))
        ]
        await until(lambda: _waiting(connection, len(importing)), "both imports wait")
        await blocking.rollback()
        await asyncio.gather(*importing)
    assert [one["event"] for one in events].count("job.succeeded") == len(importing)
    assert [one for one in events if one.get("sqlstate") == DEADLOCK] == []
    assert (await names(connection)).keys() == {*THERE, *new}


LOOKED_AHEAD = """
    SELECT count(*) FROM pg_stat_activity
     WHERE datname = current_database() AND state = 'idle in transaction'
       AND query LIKE '%FROM bulwark_match%'
"""
STOPPED = """
    SELECT count(*) FROM pg_locks
     WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid))
"""
LOCK = "SELECT FROM hero WHERE external_id = $1 FOR UPDATE NOWAIT"


@pytest.mark.usefixtures("heroes")
async def test_rows_that_change_before_they_are_locked_are_locked_in_their_turn_all_the_same(
    sessions: Sessions, database_url: str, connection: asyncpg.Connection
) -> None:
    """Or an import held a later row when it waited for them, and closed a circle."""
    _, _, blocked, _, changed, later = keys = THERE[:6]
    bench = Bench(sessions, database_url)
    request = InsertRows.model_validate(
        {
            "table": "hero",
            "rows": file("file", keys),
            "on_conflict": "update",
            "chunk_rows": 2,  # from the third chunk on they know that they meet rows, and look
        }
    )
    async with connected(database_url) as other:
        blocking = connection.transaction()
        await blocking.start()
        await connection.execute(LOCK, blocked)
        importing = asyncio.create_task(bench.run(request))
        await until(lambda: stopped_by(connection), "the second chunk waits")
        await until(lambda: other.fetchval(LOOKED_AHEAD), "the third chunk has looked at its rows")
        await other.execute("UPDATE hero SET age = 7 WHERE external_id = $1", changed)
        async with other.transaction():
            await other.execute(LOCK, changed)
            await blocking.rollback()
            await until(lambda: stopped_by(other), "the third chunk waits for what changed")
            await other.execute(LOCK, later)
    assert await bench.counts(await importing) == {"updated": 6}
    assert await connection.fetchval("SELECT age FROM hero WHERE external_id = $1", changed) == 7


async def stopped_by(connection: asyncpg.Connection) -> bool:
    return bool(await connection.fetchval(STOPPED))


async def _waiting(connection: asyncpg.Connection, number: int) -> bool:
    return bool(await connection.fetchval(WAITING) >= number)


DISTURBANCES = (
    "UPDATE hero SET name = 'other:' || external_id WHERE external_id = $1 AND deleted_at IS NULL",
    "UPDATE hero SET deleted_at = now() WHERE external_id = $1 AND deleted_at IS NULL",
    "DELETE FROM hero WHERE id = (SELECT min(id) FROM hero WHERE external_id = $1)",
)


async def disturb(url: str, stop: asyncio.Event) -> int:
    """Update, soft-delete and remove all the while; how often. One row at a time can't deadlock."""
    done = 0
    async with connected(url) as connection:
        while not stop.is_set():
            sql = DISTURBANCES[done % len(DISTURBANCES)]
            await connection.execute(sql, KEYS[done * 7 % len(KEYS)])
            done += 1
    return done


@pytest.mark.usefixtures("heroes")
@pytest.mark.parametrize("on_deleted", ["insert", "revive"])
async def test_imports_beside_a_writer_that_changes_and_removes_their_rows_succeed(
    on_deleted: str, sessions: Sessions, database_url: str, connection: asyncpg.Connection
) -> None:
    stop = asyncio.Event()
    disturbing = asyncio.create_task(disturb(database_url, stop))
    try:
        jobs, _ = await import_at_once(
            sessions, database_url, on_conflict="update", on_deleted=on_deleted, chunk_rows=50
        )
    finally:
        stop.set()
    assert await disturbing > 0
    bench = Bench(sessions, database_url)
    for job_id in jobs.values():
        done = await bench.job(job_id)
        assert done.state == "succeeded", done.error
        counts = await bench.counts(job_id)
        assert sum(counts.values()) == len(KEYS)
        assert counts.keys() <= {"inserted", "updated", "revived", "unchanged"}
        lines = [line for line in await bench.audit(job_id) if line["action"] != "insert"]
        assert len(lines) == counts.get("updated", 0) + counts.get("revived", 0)
    await names(connection)  # no key is twice among the living


# Crashes

CRASH_ROWS = 6_000
CRASH_CHUNK_ROWS = 100


def write_file(path: Path) -> None:
    """Rows of which many have a key in common, and some are refused."""
    with path.open("w", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(["name", "age", "external_id"])
        for n in range(CRASH_ROWS):
            rows.writerow([f"Hero {n % 1000}", -1 if n % 50 == 0 else n % 70, KEYS[n * 7 % 600]])


async def what_came_of(connection: asyncpg.Connection, job_id: UUID) -> Any:
    """Rows, end, receipts, verdicts and audit, without claims, times and which numbers ids have."""
    queries = [
        "SELECT name, age, external_id, version FROM hero ORDER BY id",
        "SELECT state, reason, error, outcome, attempt FROM bulwark.job WHERE id = $1",
        """SELECT chunk_no, first_row, rows, filtered, start_byte, end_byte, counts
             FROM bulwark.chunk WHERE job_id = $1 ORDER BY 1""",
        """SELECT row_no, chunk_no, line, verdict, code, "column", message, raw
             FROM bulwark.verdict WHERE job_id = $1 ORDER BY 1""",
        """SELECT chunk_no, entry_no, action, rows, before, external_id FROM bulwark.audit
             LEFT JOIN hero ON id = (keys -> 'keys' -> 0 ->> 0)::bigint
            WHERE job_id = $1 ORDER BY 1, 2""",
    ]
    return [
        [tuple(row) for row in await connection.fetch(sql, *([job_id] if "$1" in sql else []))]
        for sql in queries
    ]


async def test_an_updating_import_that_is_killed_twice_ends_as_an_undisturbed_one(
    bench: Bench,
    database_url: str,
    redis_url: str,
    connection: asyncpg.Connection,
    tmp_path: Path,
) -> None:
    path = tmp_path / "heroes.csv"
    write_file(path)
    request: dict[str, Any] = {
        "table": "hero",
        "on_conflict": "update",
        "chunk_rows": CRASH_CHUNK_ROWS,
    }
    calm = await bench.run_file(path, "spooled", **request)
    expected = await what_came_of(connection, calm)
    await connection.execute("TRUNCATE hero RESTART IDENTITY CASCADE")

    job_id = await bench.enqueue_file(path, "spooled", **request)
    with workers(tmp_path) as start:
        for chunks in (15, 30):
            worker = start(environment(database_url, redis_url, **QUICK))
            committed = partial(_chunks, connection, job_id, chunks)
            await until(committed, f"{chunks} chunks are committed")
            worker.kill()
            state = await connection.fetchval("SELECT state FROM bulwark.job WHERE id = $1", job_id)
            assert state == "running"
        start(environment(database_url, redis_url, **QUICK))
        await until(lambda: _succeeded(connection, job_id), "the import has ended")
    assert await what_came_of(connection, job_id) == expected


async def _chunks(connection: asyncpg.Connection, job_id: UUID, number: int) -> bool:
    sql = "SELECT count(*) FROM bulwark.chunk WHERE job_id = $1"
    return bool(await connection.fetchval(sql, job_id) > number)


async def _succeeded(connection: asyncpg.Connection, job_id: UUID) -> bool:
    state = await connection.fetchval("SELECT state FROM bulwark.job WHERE id = $1", job_id)
    return bool(state == "succeeded")
