"""A purge of three levels whose workers are killed removes what the dry run said, and once."""

import json
import random
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from backports import zstd

from jobs.purge_deleted_rows import PurgeDeletedRows
from tests.inprocess import Bench
from tests.workers import environment, until, workers

TABLES = ("team", "hero", "membership", "transfer")
DAYS = dict.fromkeys(TABLES, 30)
QUICK = {"beat_interval_s": "0.3", "lost_after_s": "1.0", "relay_interval_s": "0.1"}
DELETED = "CASE WHEN random() < 0.98 THEN now() - random() * interval '900 days' END"
FILL = f"""
    SELECT setseed(0.7);
    INSERT INTO team (name, deleted_at)
        SELECT 'Team ' || n, {DELETED} FROM generate_series(1, 400) n;
    INSERT INTO hero (name, team_id, deleted_at)
        SELECT 'Hero ' || n, 1 + n % 400, {DELETED} FROM generate_series(1, 1200) n;
    INSERT INTO membership (hero_id, team_id, role, deleted_at)
        SELECT 1 + n % 1000, 1 + n % 400, n, {DELETED} FROM generate_series(1, 1500) n;
    INSERT INTO transfer (hero_id, from_team_id, to_team_id, deleted_at)
        SELECT 1 + n % 900, 1 + n % 400, 1 + n % 300, {DELETED} FROM generate_series(1, 900) n;
"""


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.once)])
async def test_a_purge_that_is_killed_removes_and_archives_each_row_once(
    bench: Bench,
    database_url: str,
    redis_url: str,
    connection: asyncpg.Connection,
    tmp_path: Path,
    seed: int,
) -> None:
    await connection.execute(FILL)
    before = await content(connection)
    dry_run = await bench.run(PurgeDeletedRows(retention_days=DAYS, dry_run=True))
    foreseen: Any = (await bench.job(dry_run)).outcome
    archive = tmp_path / "archive"
    payload = PurgeDeletedRows(
        retention_days=DAYS, archive=str(archive), batch_rows=30, target_s=0.01
    )

    job_id = (await bench.producer.enqueue(payload)).job_id
    kills = sorted(random.Random(seed).sample(range(1, 14), 2))
    env = environment(database_url, redis_url, archive_folders=str(archive), **QUICK)
    with workers(tmp_path) as start:
        for chunks in kills:
            worker = start(env)
            committed = partial(chunks_of, connection, job_id, chunks)
            await until(committed, f"{chunks} chunks are committed")
            worker.kill()
            assert (await bench.job(job_id)).state == "running"
        start(env)
        await until(lambda: ended(connection, job_id), "the purge has ended", 120.0)

    done: Any = await bench.job(job_id)
    assert done.state == "succeeded", done.error
    removed = {name: before[name] - (await content(connection))[name] for name in TABLES}
    counted = {name: table["purged"] for name, table in foreseen["tables"].items()}
    assert {name: sum(rows.values()) for name, rows in removed.items()} == counted
    assert done.outcome["verdicts"] == foreseen["verdicts"]
    assert archived(archive / str(job_id)) == removed
    assert len(await bench.verdicts(job_id)) == foreseen["verdicts"]["kept"]
    assert sum(line["rows"] for line in await bench.audit(job_id)) == sum(counted.values())


async def content(connection: asyncpg.Connection) -> dict[str, Counter[int]]:
    return {
        name: Counter(row["id"] for row in await connection.fetch(f"SELECT id FROM {name}"))
        for name in TABLES
    }


def archived(folder: Path) -> dict[str, Counter[int]]:
    """How often each row is in the pieces of the manifest, and that there are no others."""
    pieces = json.loads((folder / "manifest.json").read_text())["pieces"]
    names = {"manifest.json", *(piece["name"] for piece in pieces)}
    assert {path.name for path in folder.iterdir()} == names
    found: dict[str, Counter[int]] = {name: Counter() for name in TABLES}
    for piece in pieces:
        lines = zstd.decompress((folder / piece["name"]).read_bytes()).splitlines()
        found[piece["table"]].update(json.loads(line)["id"] for line in lines)
    return found


async def chunks_of(connection: asyncpg.Connection, job_id: UUID, number: int) -> bool:
    sql = "SELECT count(*) FROM bulwark.chunk WHERE job_id = $1"
    return bool(await connection.fetchval(sql, job_id) > number)


async def ended(connection: asyncpg.Connection, job_id: UUID) -> bool:
    sql = "SELECT finished_at IS NOT NULL FROM bulwark.job WHERE id = $1"
    return bool(await connection.fetchval(sql, job_id))
