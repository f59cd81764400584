"""Tables of every kind take rows in bulk exactly as they take them one by one."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from structlog.testing import capture_logs

from db.catalog import read_facts
from db.engine import make_sessions
from db.ledger.audit import Keys
from db.outcome import Inserted, Miscounted
from db.refusal import Refusal
from db.registry import Model, discover_models
from jobs.insert_rows import InsertRows
from tests import unusual_models
from tests.inprocess import Bench

MODELS = discover_models([unusual_models.__name__])
CODES = {
    "23502": "not_null_violation",
    "23503": "foreign_key_violation",
    "23505": "unique_violation",
    "23514": "check_violation",
    "23P01": "exclusion_violation",
}
CLASHES = ("unique_violation", "exclusion_violation")
Rows = list[dict[str, Any]]
MADE_UP = {"badge": ["id"]}
"""Columns whose values are random."""

COUNTRIES: Rows = [{"code": "FR", "name": "France"}, {"code": "IT", "name": "Italy"}]
SEATS: Rows = [{"hall": "A", "number": 1}, {"hall": "A", "number": 2, "guest": "Ann"}]
CASES: dict[str, tuple[dict[str, Rows], Rows]] = {
    "country": (
        {"country": COUNTRIES},
        [
            {"code": "DE", "name": "Germany"},
            {"code": "FR", "name": "Frankreich"},
            {"code": "ES", "name": "Italy"},
            {"code": "DE", "name": "Deutschland"},
            {"code": "DE", "name": "Germany"},
            {"code": "PT", "name": "Deutschland"},
            {"code": "PL", "name": None},
        ],
    ),
    "seat": (
        {"seat": SEATS},
        [
            {"hall": "A", "number": 1, "guest": "Bob"},
            {"hall": "B", "number": 1, "guest": "Ann"},
            {"hall": "B", "number": 1, "guest": "Bob"},
            {"hall": "B", "number": 1, "guest": "Cid"},
            {"hall": "B", "number": 2, "guest": "Cid"},
            {"hall": "A", "number": 3, "guest": "Cid"},
        ],
    ),
    "ticket": (
        {"seat": SEATS},
        [
            {"hall": "A", "number": 1, "price": 3},
            {"hall": "A", "number": 9, "price": 3},
            {"hall": "A", "number": None, "price": 3},
            {"hall": None, "number": None, "price": 3},
            {"hall": "Z", "number": 2, "price": -1},
        ],
    ),
    "badge": (
        {"badge": [{"label": "one"}]},
        [{"label": label} for label in ("two", "one", "two", "three")],
    ),
    "gadget": (
        {},
        [
            {"colour": "red", "spec": {"a": [1, None, "ü"]}, "tags": ["x", 'y"z', ""]},
            {"colour": "blue", "spec": None, "tags": [], "price": "9999.99"},
            {"colour": "green"},
            {"colour": "red", "spec": '{"a": 1}', "tags": '["b"]', "price": 1.5},
            {"colour": "red", "spec": "{broken"},
            {"colour": "red", "price": "10000"},
            {"colour": "red", "price": "0.005"},
            {"colour": "red", "name": "longer"},
            {"colour": "red", "name": "right"},
            {"colour": "red", "small": 40_000},
            {"colour": "red", "whole": 2**31},
            {"colour": "red", "large": 2**63},
            {"colour": "red", "small": -(2**15), "whole": -(2**31), "large": -(2**63)},
        ],
    ),
    "folder": (
        {"folder": [{"id": 1, "name": "root"}]},
        [
            {"id": 2, "name": "below the root", "parent_id": 1},
            {"id": 3, "name": "below one before", "parent_id": 2},
            {"id": 4, "name": "below one after", "parent_id": 5},
            {"id": 5, "name": "below itself", "parent_id": 5},
            {"id": 6, "name": "below one refused", "parent_id": 4},
            {"id": 2, "name": "again", "parent_id": 1},
            {"id": 7, "name": "alone", "parent_id": None},
        ],
    ),
    "place": (
        {"country": COUNTRIES, "place": [{"position": 1}]},
        [
            {"position": 2, "country": "FR"},
            {"position": 1, "country": "FR"},
            {"position": 2, "country": "XX"},
            {"position": 3, "country": "XX"},
            {"position": 3, "country": "IT"},
            {"position": 3, "country": None},
            {"position": 4, "country": None},
        ],
    ),
    "account": (
        {"account": [{"email": "Ann@x.org", "code": "A", "handle": "ann"}]},
        [
            {"email": "bob@x.org", "code": "B", "handle": "ann", "active": False},
            {"email": "ANN@x.org", "code": "C"},
            {"email": "cid@x.org", "code": None},
            {"email": "dan@x.org", "code": None},
            {"email": "eve@x.org", "code": "A"},
            {"email": "fay@x.org", "code": "F", "handle": "ann"},
            {"email": "gus@x.org", "code": "G", "handle": "gus"},
            {"email": "hal@x.org", "code": "H", "handle": "gus", "active": False},
            {"email": "Gus@x.org", "code": "I", "handle": "gus"},
        ],
    ),
    "booking": (
        {"booking": [{"room": "x", "first": 1, "last": 5}]},
        [
            {"room": "a", "first": 5, "last": 7},
            {"room": "b", "first": 4, "last": 6},
            {"room": "c", "first": 6, "last": 9},
            {"room": "d", "first": 7, "last": 9},
            {"room": "e", "first": 9, "last": 9},
            {"room": "f", "first": 9, "last": 8},
        ],
    ),
    "item": (
        {"item": [{"count": 2, "price": 3}]},
        [
            {"count": 5, "price": 5},
            {"count": 3, "price": 2},
            {"count": 1, "price": 25},
            {"count": 10, "price": 100},
            {"count": 10, "price": 99},
            {"count": 2**20, "price": 2**20},
        ],
    ),
    "order": (
        {"order": [{"select": "a", "Mixed": 1}]},
        [
            {"select": "b", "Mixed": 7},
            {"select": "a", "Mixed": 2},
            {"select": "c", "Mixed": None},
            {"select": "c", "Mixed": 3},
        ],
    ),
    "note": (
        {},
        [
            {"title": "One Two"},
            {"title": "refuse"},
            {"title": "Three", "slug": "own", "rank": 5},
            {"title": "Four", "mood": None},
            {"title": "Five", "mood": "glad"},
            {"title": "Six"},
        ],
    ),
}


class Told(NamedTuple):
    """What became of the rows: verdicts by name, and the number and code of each refused one."""

    counts: Counter[str]
    refused: list[tuple[int, str]]
    table: list[tuple[Any, ...]]


async def _insert(connection: AsyncConnection, model: Model, row: dict[str, Any]) -> str | None:
    """Insert one row by itself; None, or the code of its refusal."""
    try:
        valid = model.create.model_validate(row)
    except ValidationError:
        return "invalid"
    values = {
        name: value
        for name, value in valid.model_dump().items()
        if value is not None or name in valid.model_fields_set
    }
    try:
        async with connection.begin_nested():
            await connection.execute(model.table.insert().values(values))
            await connection.execute(sa.text("SET CONSTRAINTS ALL IMMEDIATE"))
    except DBAPIError as error:
        state = getattr(error.orig, "sqlstate", None) or "22000"  # asyncpg refused to send it
        return CODES.get(state, "data_exception" if state.startswith("22") else state)
    return None


async def _table(connection: AsyncConnection, table: sa.Table) -> list[tuple[Any, ...]]:
    shown = [column for column in table.c if column.name not in MADE_UP.get(table.name, [])]
    order = [column for column in table.primary_key if column in shown] or shown
    key = table.c.get("id")
    if key is not None and key.autoincrement is True and key not in table.foreign_keys:
        shown.remove(key)
    rows = await connection.execute(sa.select(*shown).order_by(*order))
    return [tuple(row) for row in rows]


async def _reset(engine: AsyncEngine, before: dict[str, Rows]) -> None:
    async with engine.begin() as connection:
        names = ", ".join(f'"{name}"' for name in unusual_models.metadata.tables)
        await connection.execute(sa.text(f"TRUNCATE {names} RESTART IDENTITY"))
        for name, rows in before.items():
            for row in rows:
                await connection.execute(MODELS[name].table.insert().values(row))


async def insert_one_by_one(
    engine: AsyncEngine, model: Model, rows: Sequence[dict[str, Any]], on_conflict: str
) -> Told:
    """The reference: single INSERTs by SQLAlchemy in savepoints."""
    told = Told(Counter(), [], [])
    async with engine.begin() as connection:
        for number, row in enumerate(rows, 1):
            code = await _insert(connection, model, row)
            if code is None:
                told.counts["inserted"] += 1
            elif code in CLASHES and on_conflict == "skip":
                told.counts["skipped"] += 1
            else:
                told.counts["rejected"] += 1
                told.refused.append((number, code))
        return told._replace(table=await _table(connection, model.table))


async def insert_in_bulk(
    bench: Bench, engine: AsyncEngine, model: Model, payload: InsertRows
) -> Told:
    job_id = await bench.run(payload)
    done = await bench.job(job_id)
    assert done.state == "succeeded", done.error
    refused = [(one.row_no, one.code) for one in await bench.verdicts(job_id)]
    async with engine.connect() as connection:
        table = await _table(connection, model.table)
    return Told(Counter(await bench.counts(job_id)), refused, table)


@pytest.fixture
def bench(bench: Bench, unusual_tables: None) -> Bench:
    bench.models = MODELS
    return bench


@pytest.mark.parametrize("on_conflict", ["reject", "skip"])
@pytest.mark.parametrize("name", CASES)
async def test_a_table_takes_in_chunks_what_it_takes_one_by_one(
    name: str, on_conflict: str, bench: Bench, engine: AsyncEngine
) -> None:
    before, rows = CASES[name]
    await _reset(engine, before)
    expected = await insert_one_by_one(engine, MODELS[name], rows, on_conflict)
    for chunk_rows in (1, 2, 3, 100):
        await _reset(engine, before)
        payload = InsertRows.model_validate(
            {"table": name, "rows": rows, "on_conflict": on_conflict, "chunk_rows": chunk_rows}
        )
        assert await insert_in_bulk(bench, engine, MODELS[name], payload) == expected


@pytest.mark.parametrize("name", ["folder", "country", "seat", "badge"])
async def test_the_audit_lists_the_keys_of_the_rows_that_went_in_and_no_others(
    name: str, bench: Bench, engine: AsyncEngine
) -> None:
    before, rows = CASES[name]
    table = MODELS[name].table
    await _reset(engine, before)
    old = await _keys(engine, table)
    job_id = await bench.run(InsertRows(table=name, rows=rows, chunk_rows=4, on_conflict="skip"))
    told: list[Any] = []
    for entry in await bench.audit(job_id):
        keys = [tuple(key) for key in entry["keys"].get("keys", [])]
        for low, high in entry["keys"].get("ranges", []):
            keys += [(str(key),) for key in range(low, high + 1)]
        assert entry["rows"] == len(keys)
        told += keys
    new = [key for key in await _keys(engine, table) if key not in old]
    assert sorted(tuple(map(str, key)) for key in told) == sorted(new)
    assert new


MEDDLE = """
    CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF NEW.code = 'xx' AND NOT EXISTS (SELECT FROM country) THEN RETURN NULL; END IF;
        NEW.code := CASE NEW.code WHEN 'b' THEN 'a' WHEN 'c' THEN 'b' ELSE upper(NEW.code) END;
        RETURN NEW;
    END $$
"""


async def _meddle(engine: AsyncEngine, table: str) -> None:
    """Have a trigger leave rows out, and give others a key that another row was to have."""
    async with engine.begin() as connection:
        await connection.execute(sa.text(MEDDLE.replace(":=", r"\:=")))
        await connection.execute(
            sa.text(
                f"CREATE TRIGGER meddle BEFORE INSERT ON {table} FOR EACH ROW "
                "EXECUTE FUNCTION meddle()"
            )
        )


@pytest.mark.parametrize(
    ("on_conflict", "refused"),
    [("skip", []), ("reject", [(1, "suppressed"), (5, "unique_violation")])],
)
async def test_keys_that_a_trigger_changed_are_audited_as_they_were_written(
    on_conflict: Literal["reject", "skip"],
    refused: list[tuple[int, str]],
    bench: Bench,
    engine: AsyncEngine,
) -> None:
    await _meddle(engine, "country")
    codes = ["xx", "c", "b", "de", "b"]
    rows: Rows = [{"code": code, "name": f"{at}"} for at, code in enumerate(codes)]
    job_id = await bench.run(InsertRows(table="country", rows=rows, on_conflict=on_conflict))
    assert [(one.row_no, one.code) for one in await bench.verdicts(job_id)] == refused
    [entry] = await bench.audit(job_id)
    assert entry["keys"] == {"keys": [["b"], ["a"], ["DE"]]}
    assert sorted(await _keys(engine, MODELS["country"].table)) == [("DE",), ("a",), ("b",)]


async def test_a_row_that_a_trigger_left_out_is_refused_in_words_that_name_the_cause(
    bench: Bench, engine: AsyncEngine
) -> None:
    await _meddle(engine, "country")
    rows: Rows = [{"code": "xx", "name": "X"}]
    job_id = await bench.run(InsertRows(table="country", rows=rows))
    [left_out] = await bench.verdicts(job_id)
    assert left_out.message is not None
    assert "a BEFORE INSERT trigger of country left the row out" in left_out.message
    assert await bench.audit(job_id) == []


async def test_the_facts_of_a_table_are_read_in_four_queries(
    bench: Bench, engine: AsyncEngine
) -> None:
    asked: list[str] = []
    event.listen(engine.sync_engine, "before_cursor_execute", lambda *args: asked.append(args[2]))
    async with bench.sessions() as session:
        facts = await read_facts(session, MODELS["seat"].table)
    assert len(asked) == 4
    assert (facts.primary_key, facts.has_triggers) == (("hall", "number"), False)


@pytest.mark.parametrize("on_conflict", ["reject", "skip"])
async def test_a_trigger_of_a_partition_counts_as_one_of_the_table(
    on_conflict: Literal["reject", "skip"], bench: Bench, engine: AsyncEngine
) -> None:
    async with engine.begin() as connection:
        for statement in (
            "DROP TABLE country CASCADE",
            "CREATE TABLE country (code text PRIMARY KEY, name text) PARTITION BY LIST (code)",
            "CREATE TABLE country_rest PARTITION OF country DEFAULT",
        ):
            await connection.execute(sa.text(statement))
    await _meddle(engine, "country_rest")
    rows: Rows = [{"code": code, "name": "N"} for code in ("xx", "de", "fr")]
    job_id = await bench.run(InsertRows(table="country", rows=rows, on_conflict=on_conflict))
    verdict = "rejected" if on_conflict == "reject" else "skipped"
    assert await bench.counts(job_id) == {"inserted": 2, verdict: 1}
    [entry] = await bench.audit(job_id)
    assert entry["keys"] == {"keys": [["DE"], ["FR"]]}


async def test_more_natural_keys_than_a_statement_takes_parameters_are_looked_up_at_once(
    bench: Bench, engine: AsyncEngine, tmp_path: Path
) -> None:
    many = 40_000
    async with engine.begin() as connection:
        await connection.execute(
            sa.text(
                "INSERT INTO country (code, name) SELECT 'c' || n, 'name of ' || n "
                "FROM generate_series(1, :many) AS n"
            ),
            {"many": many},
        )
    bench.import_folders.append(tmp_path)
    file = tmp_path / "passes.csv"
    file.write_text("country\n" + "".join(f"name of {n}\n" for n in range(1, many + 2)))
    job_id = await bench.run_file(
        file, "in place", table="pass", map={"country": "country.name"}, chunk_rows=100_000
    )
    assert await bench.counts(job_id) == {"inserted": many, "rejected": 1}
    [unknown] = await bench.verdicts(job_id)
    assert (unknown.row_no, unknown.code) == (many + 1, "missing_reference")


async def test_the_log_tells_of_long_lists_of_keys_only_their_number_first_and_last(
    bench: Bench, engine: AsyncEngine
) -> None:
    rows: Rows = [{"hall": "C", "number": number} for number in (3, 1, 2)]
    with capture_logs() as lines:
        job_id = await bench.run(InsertRows(table="seat", rows=rows))
        await bench.run(InsertRows(table="item", rows=[{"count": 1, "price": 2}]))
    written = [line["keys"] for line in lines if line["event"] == "audit.written"]
    assert written == [
        {"count": 3, "first": ["C", 3], "last": ["C", 2]},
        {"ranges": [[1, 1]]},
    ]
    [entry] = await bench.audit(job_id)
    assert entry["keys"] == {"keys": [["C", 3], ["C", 1], ["C", 2]]}


@pytest.mark.parametrize(
    ("inserted", "skipped", "wrong"),
    [({0}, set(), r"without an outcome are the positions \[2\]"), ({0, 1, 2}, {2}, r"two .*\[2\]")],
)
def test_outcomes_that_do_not_add_up_are_an_error_and_no_count(
    inserted: set[int], skipped: set[int], wrong: str
) -> None:
    refused = {} if 1 in inserted else {1: Refusal("refused", "no")}
    told = Inserted(Keys(), frozenset(inserted), frozenset(skipped), refused)
    with pytest.raises(Miscounted, match=wrong):
        told.accounting_for(3)


async def _keys(engine: AsyncEngine, table: sa.Table) -> list[tuple[str, ...]]:
    async with engine.connect() as connection:
        rows = await connection.execute(sa.select(*table.primary_key))
        return [tuple(map(str, row)) for row in rows]


async def test_a_value_that_cannot_be_sent_at_all_is_refused_without_being_quoted(
    bench: Bench,
) -> None:
    rows = [{"colour": "red", "small": number} for number in (1, 40_000, 2)]
    job_id = await bench.run(InsertRows.model_validate({"table": "gadget", "rows": rows}))
    [bad] = await bench.verdicts(job_id)
    assert (bad.row_no, bad.code) == (2, "data_exception")
    assert bad.message == "a value does not fit the type of its column (OverflowError)"


@pytest.mark.usefixtures("unusual_tables")
async def test_tables_alike_but_for_a_type_keep_their_values_apart(database_url: str) -> None:
    """One connection stages them all under one name."""
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
    bench = Bench(make_sessions(engine), database_url, models=MODELS)
    for table in ("gauge", "meter", "gauge", "meter"):
        for reading in (7, 8):  # inserted directly, then staged
            rows: Rows = [{"code": "a", "marks": [1], "reading": reading}]
            job_id = await bench.run(InsertRows(table=table, rows=rows, on_conflict="update"))
            assert (await bench.job(job_id)).state == "succeeded"
    async with engine.connect() as connection:
        for table in ("gauge", "meter"):
            read = await connection.execute(sa.text(f"SELECT marks, reading FROM {table}"))
            assert [tuple(one) for one in read] == [([1], 8)]
    await engine.dispose()


@pytest.mark.usefixtures("unusual_tables")
async def test_what_becomes_of_a_row_does_not_depend_on_the_others(bench: Bench) -> None:
    bench.models = MODELS
    zoned: dict[str, Any] = {"code": "a", "at": "2020-01-01T00:00:00+05:00"}
    plain: dict[str, Any] = {"code": "b", "at": "2020-01-01T00:00:00"}
    full: dict[str, Any] = {"code": "c", "at": "2020-01-01T00:00:00", "urgency": 2}
    companies: list[Rows] = [[], [plain], [full], [plain, full]]
    for company in companies:
        rows: Rows = [zoned, *company]
        payload = InsertRows(table="notice", rows=rows, on_conflict="update")
        job_id = await bench.run(payload)
        assert [(one.row_no, one.code) for one in await bench.verdicts(job_id)] == [
            (1, "data_exception")
        ]


@pytest.mark.usefixtures("unusual_tables")
async def test_a_value_of_another_type_than_its_column_is_refused_alone(bench: Bench) -> None:
    rows: Rows = [
        {"place": [1, 2]},
        {"day": "yesterday"},
        {"day": None, "tags": ["x"]},
        {"place": [1]},
        {"day": "yesterday", "tags": []},
    ]
    for on_conflict in ("reject", "update"):
        payload = {"table": "errand", "rows": rows, "on_conflict": on_conflict}
        job_id = await bench.run(InsertRows.model_validate(payload))
        assert await bench.counts(job_id) == {"inserted": 2, "rejected": 3}
        told = [(one.row_no, one.code, one.message) for one in await bench.verdicts(job_id)]
        text = "a value does not fit the type of its column"
        assert told == [
            (2, "data_exception", f"{text} (AttributeError)"),
            (4, "data_exception", f"{text} (IndexError)"),
            (5, "data_exception", f"{text} (AttributeError)"),
        ]
