"""Archives: complete before anything is gone, and put back exactly as it was."""

import json
from dataclasses import replace
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
import sqlalchemy as sa
from backports import zstd
from pyarrow import parquet
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlmodel import Field, SQLModel

from db.columns import SoftDeletable
from db.registry import Registry, discover_models
from jobs._housekeeping import Housekeeping
from jobs.purge_deleted_rows import PurgeDeletedRows
from jobs.restore_archive import RestoreArchive
from tests.inprocess import Bench
from tests.object_store import object_store

OLD = timedelta(days=31)
FORMS = ["ndjson", "parquet"]
Sessions = async_sessionmaker[AsyncSession]


@pytest.fixture
def place(tmp_path: Path, bench: Bench) -> Path:
    """Where archives may be."""
    folder = tmp_path / "archive"
    bench.housekeeping = Housekeeping({"hero": 30, "membership": 30, "team": 30}, {}, [folder])
    return folder


async def content(connection: asyncpg.Connection, *tables: str) -> dict[str, list[str]]:
    """Every value of every row, as PostgreSQL writes it."""
    return {
        table: [
            row["text"]
            for row in await connection.fetch(
                f"SELECT t::text AS text FROM {table} AS t ORDER BY 1"
            )
        ]
        for table in tables
    }


async def run(bench: Bench, payload: Any, state: str = "succeeded") -> tuple[UUID, Any]:
    job_id = await bench.run(payload)
    row = await bench.job(job_id)
    assert row.state == state, row.error
    return job_id, row.outcome if state == "succeeded" else row.error


async def a_family(connection: asyncpg.Connection, heroes: int = 7) -> None:
    """A team, its heroes and their roles, all deleted long ago."""
    await connection.execute(
        "INSERT INTO team (id, name, deleted_at) VALUES (1, 'Red', now() - $1::interval)", OLD
    )
    await connection.execute(
        "INSERT INTO hero (id, name, secret_name, team_id, deleted_at)"
        " SELECT n, 'Hero ' || n, 'hush ' || n, 1, now() - $1::interval"
        "   FROM generate_series(1, $2::int) AS n",
        *(OLD, heroes),
    )
    await connection.execute(
        "INSERT INTO membership (hero_id, team_id, role, deleted_at)"
        " SELECT id, 1, 'goalkeeper', deleted_at FROM hero"
    )


@pytest.mark.parametrize("form", FORMS)
async def test_what_was_archived_is_put_back_as_it_was(
    bench: Bench, connection: asyncpg.Connection, place: Path, form: Any
) -> None:
    await a_family(connection)
    tables = ("team", "hero", "membership")
    before = await content(connection, *tables)

    job_id, outcome = await run(
        bench, PurgeDeletedRows(archive=str(place), archive_format=form, batch_rows=3)
    )
    assert await content(connection, *tables) == {name: [] for name in tables}
    assert outcome["verdicts"] == {"purged": 15}
    restored_id, restored = await run(bench, RestoreArchive(archive=outcome["archive"]))

    assert await content(connection, *tables) == before
    assert restored["verdicts"] == {"inserted": 15}
    audited = {
        (line["table_name"], line["action"]): line["rows"]
        for line in await bench.audit(restored_id)
    }
    assert set(audited) == {("team", "insert"), ("hero", "insert"), ("membership", "insert")}
    again_id, again = await run(bench, RestoreArchive(archive=str(place / str(job_id))))
    assert again["verdicts"] == {"skipped": 15}
    assert await bench.audit(again_id) == []


@pytest.mark.parametrize("form", FORMS)
async def test_the_pieces_and_their_manifest_are_complete(
    bench: Bench, connection: asyncpg.Connection, place: Path, form: Any
) -> None:
    await a_family(connection)
    ids = {row["id"] for row in await connection.fetch("SELECT id FROM hero")}
    job_id, outcome = await run(
        bench,
        PurgeDeletedRows(archive=str(place), archive_format=form, batch_rows=3, target_s=60),
    )

    folder = place / str(job_id)
    manifest = json.loads((folder / "manifest.json").read_text())
    pieces = manifest["pieces"]
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json",
        *(piece["name"] for piece in pieces),
    }
    heroes = [
        row for one in pieces if one["table"] == "hero" for row in rows_of(folder / one["name"])
    ]
    assert sorted(row["id"] for row in heroes) == sorted(ids)
    assert {row["secret_name"] for row in heroes} == {f"hush {number}" for number in ids}
    assert outcome["tables"]["hero"]["pieces"] == sum(one["table"] == "hero" for one in pieces)
    assert sum(one["rows"] for one in pieces) == 15


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        found: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        return found
    return [json.loads(line) for line in zstd.decompress(path.read_bytes()).splitlines()]


async def test_a_row_whose_parent_is_gone_is_rejected_and_told(
    bench: Bench, connection: asyncpg.Connection, place: Path
) -> None:
    await a_family(connection, heroes=2)
    _, outcome = await run(bench, PurgeDeletedRows(archive=str(place)))
    payload = RestoreArchive(archive=outcome["archive"], tables=["membership"])

    job_id, restored = await run(bench, payload)

    assert restored["verdicts"] == {"rejected": 2}
    assert {one.code for one in await bench.verdicts(job_id)} == {"foreign_key_violation"}


async def test_an_archive_that_was_changed_is_refused(
    bench: Bench, connection: asyncpg.Connection, place: Path
) -> None:
    await a_family(connection)
    job_id, outcome = await run(bench, PurgeDeletedRows(archive=str(place)))
    [damaged, *_] = (place / str(job_id)).glob("hero-*")
    damaged.write_bytes(damaged.read_bytes() + b"\0")

    for dry_run in (True, False):
        payload = RestoreArchive(archive=outcome["archive"], tables=["hero"], dry_run=dry_run)
        _, error = await run(bench, payload, "failed")
        assert "checksum" in error
    assert await content(connection, "hero") == {"hero": []}


async def test_a_place_that_is_not_allowed_is_refused(bench: Bench, tmp_path: Path) -> None:
    bench.housekeeping = Housekeeping(
        {"hero": 30}, {}, [tmp_path / "archive", "s3://bucket/archive"]
    )
    for outside in (tmp_path / "other", tmp_path / "archive/../other", "s3://bucket/archive2"):
        _, error = await run(bench, PurgeDeletedRows(archive=str(outside)), "failed")
        assert "BULWARK_ARCHIVE_FOLDERS" in error
        _, error = await run(bench, RestoreArchive(archive=str(outside)), "failed")
        assert "BULWARK_ARCHIVE_FOLDERS" in error


async def test_a_place_that_cannot_be_written_puts_the_purge_off_and_removes_nothing(
    bench: Bench, connection: asyncpg.Connection, place: Path
) -> None:
    await a_family(connection)
    place.write_text("a file in the way")  # noqa: ASYNC240 - before anything else runs

    job_id = await bench.run(PurgeDeletedRows(archive=str(place)))

    row = await bench.job(job_id)
    assert (row.state, row.reason, row.attempt) == ("queued", "deferred", 0)
    assert "cannot be written" in str(row.error)
    assert await connection.fetchval("SELECT count(*) FROM membership") == 7
    assert (await bench.tally(job_id)).counts == {}


@pytest.mark.parametrize("form", FORMS)
async def test_an_archive_may_be_in_a_store_of_objects(
    bench: Bench, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, form: Any
) -> None:
    bench.housekeeping = Housekeeping(
        {"hero": 30, "membership": 30, "team": 30}, {}, ["s3://bucket/old"]
    )
    await a_family(connection)
    before = await content(connection, "hero", "membership")
    with object_store() as store:
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        job_id, outcome = await run(
            bench, PurgeDeletedRows(archive="s3://bucket/old", archive_format=form)
        )
        assert outcome["archive"] == f"s3://bucket/old/{job_id}/manifest.json"
        assert f"/bucket/old/{job_id}/manifest.json" in store.objects
        assert len(store.objects) == 4
        _, restored = await run(bench, RestoreArchive(archive=outcome["archive"]))

        assert restored["verdicts"] == {"inserted": 15}
        assert await content(connection, "hero", "membership") == before

        store.refuses = HTTPStatus.FORBIDDEN
        put_off = await bench.job(await bench.run(PurgeDeletedRows(archive="s3://bucket/old")))
        assert (put_off.state, put_off.reason) == ("queued", "deferred")
    assert await content(connection, "hero", "membership") == before


# Values of every type


ODD = 'odd: %s/"name"'
QUOTED = '"odd: %s/""name"""'


class Oddity(SoftDeletable, SQLModel, table=True):
    """What the registry has to know of it; the table with all its columns is made below."""

    __tablename__ = ODD
    metadata = sa.MetaData()
    hall: str = Field(primary_key=True)
    number: int = Field(primary_key=True)


TYPES = r"""
    CREATE TYPE mood AS ENUM ('calm', 'it''s "wild", \');
    CREATE DOMAIN positive AS int CHECK (VALUE > 0);
    CREATE TYPE pair AS (a int, b text);
"""
VALUES = {
    "smallint": ["1", "-32768"],
    "boolean": ["true", "false"],
    "real": ["0.1", "NaN", "3.4028235e38"],
    "double precision": ["0.1", "-Infinity", "5e-324"],
    "numeric": ["1.500", "NaN", "-1e-20"],
    "json": ['{"b": 1,  "a":2, "a": 3}', "[]", "null"],
    "jsonb": ['{"b": [1, null, 1e400]}', "null", '"x"'],
    "bytea": [r"\x00ff0a", ""],
    "date": ["infinity", "0001-01-01 BC"],
    "time": ["23:59:59.999999", "24:00"],
    "timetz": ["12:00+05:30"],
    "timestamp": ["-infinity", "4713-01-01 00:00:00 BC", "2026-03-29 02:30:00.000001"],
    "timestamptz": ["2026-10-25 00:30:00+00", "2026-10-25 01:30:00+00", "infinity"],
    "interval": ["-1 year 2 mons -3 days 04:05:06.7", "0"],
    "mood": ['it\'s "wild", \\', "calm"],
    "positive": ["7"],
    "pair": ['(1,"a,""b""")', "(,)"],
    "pair[]": ['{"(1,)",NULL}', "{}"],
    "text[]": [r'{"",NULL,"NULL","\\N","	"}', "{}"],
    "int[][]": ["[0:1][2:3]={{1,2},{3,4}}"],
    "int4range": ["[1,5)", "empty"],
    "nummultirange": ["{[1,2],(3.5,)}", "{}"],
    "inet": ["10.0.0.1/8", "::1"],
    "macaddr": ["08:00:2b:01:02:03"],
    "bit(5)": ["10101"],
    "varbit": ["101", ""],
    "tsvector": ["fat:1A cat", ""],
    "tsquery": ["fat & !rat"],
    "point": ["(1.1,2)"],
    "polygon": ["((0,0),(1,1),(1,0))"],
    "jsonpath": ["$.a[*] ? (@ > 1)"],
    "char(5)": ["ab", ""],
    '"char"': ["x"],
    "uuid": ["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"],
    "pg_lsn": ["16/B374D848"],
    "text": ["line\nbreak\r\\N\t", "", "\u00e9\U0001f600 :x %s"],
    "mood[]": ["{calm,NULL}"],
}
NAMES = [f'"v{number}: %"' for number in range(len(VALUES))]


@pytest.fixture
async def odd_rows(connection: asyncpg.Connection) -> None:
    """A table with a column for each type, and rows with each of their values, and with nulls."""
    await connection.execute(TYPES)
    columns = ", ".join(f"{name} {type_}" for name, type_ in zip(NAMES, VALUES, strict=True))
    await connection.execute(
        f"CREATE TABLE {QUOTED} (hall text, number int, deleted_at timestamptz, {columns},"
        " twice int GENERATED ALWAYS AS (number * 2) STORED, PRIMARY KEY (hall, number))"
    )
    places = ", ".join(f"CAST(CAST(${n} AS text) AS {t})" for n, t in enumerate(VALUES, 2))
    for number in range(4):
        values = [dict(enumerate(given)).get(number) for given in VALUES.values()]
        await connection.execute(
            f"INSERT INTO {QUOTED} (hall, number, deleted_at, {', '.join(NAMES)})"
            f" VALUES ('a \"hall\"', $1, now() - interval '31 days', {places})",
            *(number, *values),
        )


@pytest.fixture
def odd_bench(sessions: Sessions, database_url: str, tmp_path: Path) -> Bench:
    """A bench that knows the odd table alone."""
    table = Oddity.__table__  # type: ignore[attr-defined]  # SQLModel adds it
    odd = replace(discover_models()["hero"], name=ODD, table=table, table_class=Oddity)
    bench = Bench(sessions, database_url, models=Registry({ODD: odd}))
    bench.housekeeping = Housekeeping({ODD: 30}, {}, [tmp_path])
    return bench


@pytest.mark.usefixtures("odd_rows")
@pytest.mark.parametrize("form", FORMS)
async def test_values_of_every_type_come_back_exactly(
    odd_bench: Bench, connection: asyncpg.Connection, tmp_path: Path, form: Any
) -> None:
    before = await content(connection, QUOTED)
    assert len(before[QUOTED]) == 4

    _, outcome = await run(odd_bench, PurgeDeletedRows(archive=str(tmp_path), archive_format=form))
    assert await content(connection, QUOTED) == {QUOTED: []}
    _, restored = await run(odd_bench, RestoreArchive(archive=outcome["archive"]))

    assert restored["verdicts"] == {"inserted": 4}
    assert await content(connection, QUOTED) == before
