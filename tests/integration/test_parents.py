"""Rows that an input names by natural key are found, or made, however the key is spelt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from db.registry import discover_models
from jobs.insert_rows import InsertRows
from tests import unusual_models
from tests.inprocess import Bench

LOWERING = """
    CREATE FUNCTION lower_label() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        NEW.label := lower(NEW.label);
        RETURN NEW;
    END $$;
    CREATE TRIGGER lower_label BEFORE INSERT ON badge FOR EACH ROW EXECUTE FUNCTION lower_label()
"""
COMPARISON = """
    CREATE FUNCTION ci_{name}(ci, ci) RETURNS bool LANGUAGE sql IMMUTABLE STRICT
        AS 'SELECT lower(CAST($1 AS text)) {sign} lower(CAST($2 AS text))';
    CREATE OPERATOR {sign} (LEFTARG = ci, RIGHTARG = ci, FUNCTION = ci_{name});
"""
SIGNS = {"lt": "<", "le": "<=", "eq": "=", "ge": ">=", "gt": ">"}
IGNORING_CASE = f"""
    CREATE TYPE ci;
    CREATE FUNCTION ci_in(cstring) RETURNS ci LANGUAGE internal IMMUTABLE STRICT AS 'textin';
    CREATE FUNCTION ci_out(ci) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'textout';
    CREATE TYPE ci (INPUT = ci_in, OUTPUT = ci_out, LIKE = text, CATEGORY = 'S', COLLATABLE);
    CREATE CAST (ci AS text) WITHOUT FUNCTION AS IMPLICIT;
    CREATE CAST (text AS ci) WITHOUT FUNCTION AS ASSIGNMENT;
    CREATE CAST (varchar AS ci) WITHOUT FUNCTION AS ASSIGNMENT;
    {"".join(COMPARISON.format(name=name, sign=sign) for name, sign in SIGNS.items())}
    CREATE FUNCTION ci_cmp(ci, ci) RETURNS int LANGUAGE sql IMMUTABLE STRICT
        AS 'SELECT bttextcmp(lower(CAST($1 AS text)), lower(CAST($2 AS text)))';
    CREATE OPERATOR CLASS ci_ops DEFAULT FOR TYPE ci USING btree AS FUNCTION 1 ci_cmp(ci, ci),
        OPERATOR 1 <, OPERATOR 2 <=, OPERATOR 3 =, OPERATOR 4 >=, OPERATOR 5 >;
    ALTER TABLE badge ALTER label TYPE ci
"""
"""What the extension citext does, which is not at hand everywhere."""

CHUNKS = pytest.mark.parametrize("chunk_rows", [1, 2, 100])


@pytest.fixture
def bench(bench: Bench, unusual_tables: None) -> Bench:
    bench.models = discover_models([unusual_models.__name__])
    return bench


async def execute(engine: AsyncEngine, statements: str) -> None:
    async with engine.begin() as connection:
        raw = await connection.get_raw_connection()
        assert raw.driver_connection is not None
        await raw.driver_connection.execute(statements)


async def read(engine: AsyncEngine, query: str) -> list[tuple[Any, ...]]:
    async with engine.connect() as connection:
        return [tuple(row) for row in await connection.execute(sa.text(query))]


async def players(engine: AsyncEngine, parent: str, key: str) -> list[tuple[Any, ...]]:
    """The name of each player, and the key of the row that it refers to."""
    return await read(
        engine,
        f"SELECT p.name, o.{key} FROM player AS p "
        f"LEFT JOIN {parent} AS o ON o.id = p.{parent}_id ORDER BY p.id",
    )


async def give(
    bench: Bench, keys: Sequence[str], reference: str, chunk_rows: int = 100, **options: Any
) -> list[int]:
    """Insert a player, called by its number, for each key; the numbers of those refused."""
    job_id = await bench.run(
        InsertRows(
            table="player",
            rows=[{"name": str(number), "of": key} for number, key in enumerate(keys, 1)],
            map={"of": reference},
            chunk_rows=chunk_rows,
            **options,
        )
    )
    done = await bench.job(job_id)
    assert (done.state, done.attempt) == ("succeeded", 0), done.error
    verdicts = await bench.verdicts(job_id)
    assert {one.code for one in verdicts} <= {"missing_reference"}
    return [one.row_no for one in verdicts]


@CHUNKS
async def test_a_key_is_created_as_the_create_class_spells_it(
    chunk_rows: int, bench: Bench, engine: AsyncEngine
) -> None:
    keys = [" Arsenal ", "arsenal", "ARSENAL", "Ajax", "x" * 21]
    assert await give(bench, keys, "club.name", chunk_rows, on_missing="create") == [5]
    assert await players(engine, "club", "name") == [
        ("1", "ARSENAL"),
        ("2", "ARSENAL"),
        ("3", "ARSENAL"),
        ("4", "AJAX"),
    ]
    assert await read(engine, "SELECT count(*) FROM club") == [(2,)]


async def test_a_key_is_looked_up_as_the_create_class_spells_it(
    bench: Bench, engine: AsyncEngine
) -> None:
    await execute(engine, "INSERT INTO club (name, city) VALUES ('ARSENAL', 'LONDON')")
    assert await give(bench, [" Arsenal ", "ARSENAL", "Ajax"], "club.name") == [3]
    assert await give(bench, ["London", "Paris"], "club.city") == [2]  # a club is also named
    assert [name for name, _ in await players(engine, "club", "name")] == ["1", "2", "1"]


async def test_a_row_that_is_spelt_as_the_create_class_would_not_is_found_by_its_very_key(
    bench: Bench, engine: AsyncEngine
) -> None:
    old = "a name too long for clubs of today"
    await execute(engine, f"INSERT INTO club (name) VALUES ('Ajax'), ('{old}'), ('PSV'), ('psv')")
    assert await give(bench, ["Ajax", "ajax", old, "psv"], "club.name") == [2]
    told = await players(engine, "club", "name")
    assert told == [("1", "Ajax"), ("3", old), ("4", "PSV")]


@CHUNKS
async def test_what_a_trigger_renames_is_taken_back_and_its_rows_refused(
    chunk_rows: int, bench: Bench, engine: AsyncEngine
) -> None:
    await execute(engine, LOWERING)
    keys = ["Gold", "silver", "GOLD", "Silver", "bronze"]
    refused = await give(bench, keys, "badge.label", chunk_rows, on_missing="create")
    assert refused == [1, 3, 4]
    assert await players(engine, "badge", "label") == [("2", "silver"), ("5", "bronze")]
    assert await read(engine, "SELECT label FROM badge ORDER BY 1") == [("bronze",), ("silver",)]


@CHUNKS
async def test_keys_that_are_the_same_to_the_database_name_the_same_row(
    chunk_rows: int, bench: Bench, engine: AsyncEngine
) -> None:
    await execute(engine, IGNORING_CASE)
    await execute(engine, "INSERT INTO badge (label) VALUES ('Gold')")
    keys = ["GOLD", "Silver", "silver", "SILVER"]
    assert await give(bench, keys, "badge.label", chunk_rows, on_missing="create") == []
    labels = [label for _, label in await players(engine, "badge", "label")]
    assert [label.lower() for label in labels] == ["gold", "silver", "silver", "silver"]
    assert await read(engine, "SELECT count(*) FROM badge") == [(2,)]


async def test_more_unused_rows_than_a_statement_takes_parameters_are_taken_back(
    bench: Bench, engine: AsyncEngine, tmp_path: Path
) -> None:
    many = 33_000
    bench.import_folders.append(tmp_path)
    file = tmp_path / "players.csv"
    file.write_text("name,of\n" + "".join(f",badge {n}\n" for n in range(many)))
    job_id = await bench.run_file(
        file,
        "in place",
        table="player",
        map={"of": "badge.label"},
        on_missing="create",
        chunk_rows=100_000,
    )
    assert await bench.counts(job_id) == {"rejected": many}
    assert await read(engine, "SELECT count(*) FROM badge") == [(0,)]
