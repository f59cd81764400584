"""Names that would be SQL: those of models are quoted, those of users are refused."""

from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from db.registry import discover_models
from jobs._declaration import Payload
from jobs.insert_rows import InsertRows
from jobs.purge_deleted_rows import PurgeDeletedRows
from jobs.restore_rows import RestoreRows
from jobs.soft_delete_rows import SoftDeleteRows
from jobs.update_rows import UpdateRows
from tests import hostile_models
from tests.hostile_models import NAMES, TABLE, UNIQUE
from tests.inprocess import Bench

Counts = dict[str, int]
EVIL = ('"; DROP TABLE team; --', "name' OR '1'='1", "%s", ":x", "name; --", "team.name", "\\")
ROW = dict.fromkeys(NAMES, "'; DROP TABLE team; --")


@pytest.fixture
async def bench(bench: Bench, engine: AsyncEngine) -> Bench:
    async with engine.begin() as connection:
        await connection.run_sync(hostile_models.metadata.create_all)
    bench.models = discover_models([hostile_models.__name__])
    return bench


async def counts(bench: Bench, payload: Payload) -> Counts:
    job_id = await bench.run(payload)
    done = await bench.job(job_id)
    assert done.state == "succeeded", done.error
    return dict(await bench.counts(job_id))


async def test_every_bulk_job_works_on_a_table_with_hostile_names(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    rows: list[dict[str, Any]] = [{**ROW, UNIQUE: str(number)} for number in range(4)]
    insert: dict[str, Any] = {"table": TABLE, "rows": rows}
    assert await counts(bench, InsertRows(**insert)) == {"inserted": 4}
    assert await counts(bench, InsertRows(**insert)) == {"rejected": 4}
    assert await counts(bench, InsertRows(**insert, on_conflict="skip")) == {"skipped": 4}
    changed = [{**one, "%s": "new"} for one in rows]
    upsert = InsertRows(table=TABLE, rows=changed, on_conflict="update")
    assert await counts(bench, upsert) == {"updated": 4}
    every: dict[str, Any] = {name: {"ne": None} for name in NAMES}
    update = UpdateRows(table=TABLE, filter=every, values={":x": "newer"})
    assert await counts(bench, update) == {"updated": 4}
    patch = UpdateRows(table=TABLE, rows=[{UNIQUE: "1", "$1": "patched"}], key=[UNIQUE])
    assert await counts(bench, patch) == {"updated": 1}
    delete = SoftDeleteRows(table=TABLE, filter={UNIQUE: ["0", "1"]})
    assert await counts(bench, delete) == {"deleted": 2}
    assert await counts(bench, RestoreRows(table=TABLE, keys=[1])) == {"restored": 1}
    await connection.execute(f"UPDATE {_quoted(TABLE)} SET deleted_at = '2000-01-01' WHERE id = 2")
    purge = PurgeDeletedRows(tables=[TABLE], retention_days={TABLE: 1})
    assert await counts(bench, purge) == {"purged": 1}
    left = await connection.fetch(f"SELECT * FROM {_quoted(TABLE)} ORDER BY id")
    assert [row[UNIQUE] for row in left] == ["0", "2", "3"]
    assert {(row[":x"], row["%s"], row["--"]) for row in left} == {("newer", "new", ROW["--"])}


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@pytest.mark.parametrize(
    "make",
    [
        lambda evil: InsertRows(table=evil, rows=[]),
        lambda evil: InsertRows(table="team", rows=[{"name": "x", evil: "y"}]),
        lambda evil: InsertRows(table="team", rows=[{"n": "x"}], map={"n": "name", evil: "name"}),
        lambda evil: InsertRows(table="hero", rows=[{"n": "x"}], map={"n": evil}),
        lambda evil: InsertRows(table="team", rows=[{"name": "x"}], constants={evil: "y"}),
        lambda evil: InsertRows(table="team", rows=[{"name": "x"}], where={evil: "y"}),
        lambda evil: InsertRows(
            table="team", rows=[{"name": "x"}], on_conflict="update", update=[evil]
        ),
        lambda evil: UpdateRows(table="team", keys=[1], values={evil: "y"}),
        lambda evil: UpdateRows(table="team", filter={evil: "y"}, values={"name": "y"}),
        lambda evil: UpdateRows(table="team", filter={"name": {evil: "y"}}, values={"name": "y"}),
        lambda evil: SoftDeleteRows(table="team", keys=["x"], key=[evil]),
        lambda evil: PurgeDeletedRows(tables=[evil], retention_days={evil: 1}),
    ],
    ids=[
        "table", "column", "map from", "map to", "set", "where", "update", "values", "filter",
        "operator", "key", "purge",
    ],
)  # fmt: skip
async def test_a_hostile_name_of_a_user_is_refused_in_one_sentence(
    make: Callable[[str], Payload], bench: Bench
) -> None:
    for evil in EVIL:
        done = await bench.job(await bench.run(make(evil)))
        assert (done.state, done.reason) == ("failed", "rejected"), (evil, done.error)
        assert "\n" not in str(done.error)
