"""insert_rows: from columns to fields, what becomes of each row, and what is written down of it."""

import gzip
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import asyncpg
import pytest
import structlog

from db.registry import discover_models
from jobs.insert_rows import InsertRows
from tests import unusual_models
from tests.inprocess import Bench, Way

EITHER_WAY = pytest.mark.parametrize("way", get_args(Way))
TEAMS = """
    INSERT INTO team (id, name, deleted_at) OVERRIDING SYSTEM VALUE
        VALUES (1, 'Red', NULL), (2, 'Blue', NULL), (3, 'Gone', now()), (4, 'Red', now());
"""


@pytest.fixture
async def connection(connection: asyncpg.Connection) -> asyncpg.Connection:
    await connection.execute(TEAMS)
    return connection


@pytest.fixture
def bench(bench: Bench, tmp_path: Path, connection: asyncpg.Connection) -> Bench:
    bench.models = discover_models([unusual_models.__name__])
    bench.import_folders.append(tmp_path)
    return bench


def payload(rows: Sequence[Mapping[str, Any]], table: str = "hero", **request: Any) -> InsertRows:
    return InsertRows.model_validate({"table": table, "rows": rows, **request})


async def insert(bench: Bench, *args: Any, **request: Any) -> dict[str, int]:
    """Insert inline rows; the counts of their verdicts."""
    job_id = await bench.run(payload(*args, **request))
    done = await bench.job(job_id)
    assert done.state == "succeeded", done.error
    return dict(await bench.counts(job_id))


async def refusal(bench: Bench, *args: Any, **request: Any) -> str:
    """Why inline rows are refused as a whole."""
    done = await bench.job(await bench.run(payload(*args, **request)))
    assert (done.state, done.reason, done.attempt) == ("failed", "rejected", 1), done.error
    return str(done.error)


async def rejects(bench: Bench, *args: Any, **request: Any) -> list[tuple[int, str, str | None]]:
    job_id = await bench.run(payload(*args, **request))
    return [(one.row_no, one.code, one.column) for one in await bench.verdicts(job_id)]


async def rows_of(
    connection: asyncpg.Connection, columns: str, table: str = "hero"
) -> list[tuple[Any, ...]]:
    rows = await connection.fetch(f"SELECT {columns} FROM {table} ORDER BY 1")
    return [tuple(row) for row in rows]


# From columns to fields


async def test_inline_rows_go_in_with_what_each_has_and_null_for_the_rest(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    rows = [
        {"name": "Ann", "age": 5},
        {"name": "Bob", "email": "b@x.org"},
        {"name": "Cid", "age": None},
    ]
    assert await insert(bench, rows) == {"inserted": 3}
    assert await rows_of(connection, "name, age, email") == [
        ("Ann", 5, None),
        ("Bob", None, "b@x.org"),
        ("Cid", None, None),
    ]


async def test_no_rows_at_all_are_an_import_of_nothing(bench: Bench) -> None:
    assert await insert(bench, [], map={"club": "team.name"}, constants={"age": 5}) == {}


async def test_a_row_without_any_field_is_rejected_for_what_it_lacks(bench: Bench) -> None:
    assert await rejects(bench, [{}]) == [(1, "invalid", "name")]


@EITHER_WAY
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
async def test_a_file_goes_in_the_same_from_wherever_it_is_read(
    pack: Any, way: Way, bench: Bench, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    path = tmp_path / "heroes.csv"
    path.write_bytes(pack(b"name,club,age\nAnn,Red,\nBob,,7\nCid,Nowhere,8\n"))
    job_id = await bench.run_file(path, way, table="hero", map={"club": "team.name"})
    assert dict(await bench.counts(job_id)) == {"inserted": 2, "rejected": 1}
    assert await rows_of(connection, "name, team_id, age") == [("Ann", 1, None), ("Bob", None, 7)]
    [bad] = await bench.verdicts(job_id)
    assert (bad.line, bad.code, bad.column) == (4, "missing_reference", "club")
    assert bad.message == "club: there is no team with name 'Nowhere'"


@pytest.mark.parametrize("left", ["team", "team_id"])
async def test_a_foreign_key_is_found_by_its_table_or_its_column(
    left: str, bench: Bench, connection: asyncpg.Connection
) -> None:
    await insert(bench, [{"name": "Ann", "club": "Blue"}], map={"club": f"{left}.name"})
    assert await rows_of(connection, "name, team_id") == [("Ann", 2)]


async def test_where_two_foreign_keys_lead_to_a_table_one_has_to_be_named(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await insert(bench, [{"name": "Ann", "external_id": "A"}])
    rows = [{"hero": "A", "from": "Red", "to": "Blue"}]
    hero = {"hero": "hero.external_id"}
    assert "name one of from_team_id, to_team_id" in await refusal(
        bench, rows, "transfer", map={**hero, "from": "team.name", "to": "team.name"}
    )
    both = {**hero, "from": "from_team_id.name", "to": "to_team_id.name"}
    assert await insert(bench, rows, "transfer", map=both) == {"inserted": 1}
    [found] = await connection.fetch(
        "SELECT from_team_id, to_team_id, transferred_at FROM transfer"
    )
    assert (found["from_team_id"], found["to_team_id"]) == (1, 2)
    assert found["transferred_at"] is not None


@pytest.mark.parametrize(
    ("joined", "made"),
    [
        ("{name}|{role}|{no}", "Ann|ace|7"),
        ("{{{name}}} {{}}", "{Ann} {}"),
        ("{odd:name!}-{other name}", "odd-other"),
        ("{a.b[0]}", "dots"),
        ("{name}{nothing}", "Ann"),
    ],
    ids=["several", "braces", "marks", "dots", "empty"],
)
async def test_a_template_joins_columns_whatever_they_are_called(
    joined: str, made: str, bench: Bench, connection: asyncpg.Connection
) -> None:
    row = {
        "name": "Ann", "role": "ace", "no": 7, "odd:name!": "odd", "other name": "other",
        "a.b[0]": "dots", "nothing": None,
    }  # fmt: skip
    await insert(bench, [row], map={"external_id": joined}, ignore_unknown=True)
    assert await rows_of(connection, "external_id") == [(made,)]


async def test_a_template_of_empty_columns_alone_gives_no_value(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    rows = [{"name": "Ann", "a": None, "b": ""}]
    await insert(bench, rows, map={"external_id": "{a}{b}"})
    assert await rows_of(connection, "external_id") == [(None,)]


async def test_a_template_may_use_the_column_that_it_takes_the_place_of(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await insert(bench, [{"name": "Ann", "family": "Lee"}], map={"name": "{name} {family}"})
    assert await rows_of(connection, "name") == [("Ann Lee",)]


async def test_columns_are_renamed_and_constants_added(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await insert(bench, [{"full": "Ann"}], map={"full": "name"}, constants={"age": 5, "team_id": 2})
    assert await rows_of(connection, "name, age, team_id") == [("Ann", 5, 2)]


@pytest.mark.usefixtures("unusual_tables")
@pytest.mark.parametrize(
    ("table", "constants", "why"),
    [
        ("hero", {"age": -1}, "--set age: Input should be greater than or equal to 0"),
        ("hero", {"age": "abc"}, "--set age: Input should be a valid integer"),
        ("hero", {"name": None}, "--set name: Input should be a valid string"),
        ("hero", {"team_id": []}, "--set team_id: Input should be a valid integer"),
    ],
)
async def test_a_constant_that_no_row_could_have_is_refused_at_once(
    table: str, constants: dict[str, Any], why: str, bench: Bench
) -> None:
    message = await refusal(bench, [{"email": "a@b.c"}], table, constants=constants)
    assert message.startswith(why)
    assert message.endswith("every row would be rejected")


@pytest.mark.usefixtures("unusual_tables")
async def test_a_constant_that_only_whole_rows_can_judge_is_left_to_them(bench: Bench) -> None:
    found = await rejects(bench, [{"mood": "glad"}], "note", constants={"title": "refuse"})
    assert found == [(1, "invalid", None)]


async def test_rows_are_selected_by_all_filters_and_the_rest_is_no_input(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    rows: list[dict[str, Any]] = [
        {"name": "Ann", "movement": "in", "paid": True},
        {"name": "Bob", "movement": "out", "paid": True},
        {"name": "Cid", "movement": "in", "paid": False},
        {"name": "Dan", "movement": "in"},
        {"name": "", "movement": "out", "paid": True},
    ]
    where = {"movement": "in", "paid": "true"}
    job_id = await bench.run(payload(rows, chunk_rows=2, where=where))
    done = await bench.job(job_id)
    assert done.outcome == {"rows": 5, "filtered": 4, "verdicts": {"inserted": 1}}
    assert await rows_of(connection, "name") == [("Ann",)]


async def test_a_filter_that_no_row_meets_inserts_nothing_and_says_so(bench: Bench) -> None:
    job_id = await bench.run(payload([{"name": "Ann"}, {"name": "Bob"}], where={"name": "Zoe"}))
    done = await bench.job(job_id)
    assert done.outcome == {"rows": 2, "filtered": 2, "verdicts": {}}


async def test_columns_without_a_field_are_left_out_on_request_alone(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    rows = [{"name": "Ann", "age": 5, "shoe": 43, "gloves": 7}]
    assert "'shoe' has no field in hero (nor have 1 more columns)" in await refusal(bench, rows)
    assert "'gloves'" in await refusal(bench, rows, ignore=["shoe"])
    await insert(bench, rows, ignore=["shoe", "gloves", "age"])
    await insert(bench, [{**rows[0], "name": "Bob"}], ignore_unknown=True)
    assert await rows_of(connection, "name, age") == [("Ann", None), ("Bob", 5)]


async def test_columns_that_an_export_of_rejects_adds_are_passed_over(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    rows = [{"bulwark_line": "3", "bulwark_reason": "age: too old", "name": "Ann"}]
    assert await insert(bench, rows) == {"inserted": 1}


@pytest.mark.parametrize(
    "request_",
    [
        {"map": {"full": "name"}},
        {"map": {"name": "external_id", "external_id": "external_id"}},
        {"constants": {"name": "x"}},
        {"map": {"name": "{full}"}},
        {"map": {"full": "team.name", "age": "team_id"}},
    ],
    ids=["column and map", "two maps", "column and constant", "column and template", "reference"],
)
async def test_a_field_that_is_given_twice_is_refused(
    request_: dict[str, Any], bench: Bench
) -> None:
    row = {"name": "Ann", "full": "Ann Lee", "external_id": "A", "age": 5}
    assert "is given twice" in await refusal(bench, [row], **request_, ignore_unknown=True)


async def test_one_of_two_columns_for_a_field_can_be_left_out(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await insert(bench, [{"name": "A", "full": "Ann"}], map={"full": "name"}, ignore=["name"])
    assert await rows_of(connection, "name") == [("Ann",)]


# References


@pytest.mark.parametrize(
    ("key", "table", "right"),
    [("age", "membership", "hero.age"), ("name", "membership", "hero.name")],
    ids=["a number", "not unique"],
)
async def test_only_a_unique_text_can_name_a_row(
    key: str, table: str, right: str, bench: Bench
) -> None:
    rows = [{"hero": "x", "team_id": 1, "role": "r"}]
    message = await refusal(bench, rows, table, map={"hero": right})
    assert f"hero.{key} is no unique text" in message
    assert "use email, external_id" in message


@pytest.mark.usefixtures("unusual_tables")
async def test_an_index_on_an_expression_or_on_some_rows_names_no_row(bench: Bench) -> None:
    for key in ("email", "handle"):
        message = await refusal(bench, [{"owner": "x"}], "pass", map={"owner": f"account.{key}"})
        assert message == f"account.{key} is no unique text, so it cannot name a row; use code"


async def test_a_deleted_row_cannot_be_named_and_does_not_stand_in_the_way_of_its_name(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    rows = [{"name": "Ann", "club": "Gone"}, {"name": "Bob", "club": "Red"}]
    assert await rejects(bench, rows, map={"club": "team.name"}) == [
        (1, "missing_reference", "club")
    ]
    assert await rows_of(connection, "name, team_id") == [("Bob", 1)]


async def test_a_name_that_is_no_text_names_no_row(bench: Bench) -> None:
    values = [5, ["Red"], {"name": "Red"}, "", "red", True]
    rows = [{"name": "Ann", "club": value} for value in values]
    found = await rejects(bench, rows, map={"club": "team.name"})
    assert found == [(n, "missing_reference", "club") for n in range(1, len(values) + 1)]


async def test_the_message_about_a_name_of_half_a_mebibyte_is_short(bench: Bench) -> None:
    rows = [{"name": "Ann", "club": "x" * 500_000}]
    job_id = await bench.run(payload(rows, map={"club": "team.name"}))
    [bad] = await bench.verdicts(job_id)
    assert bad.code == "missing_reference"
    assert len(bad.message) < 300


async def test_a_row_that_names_no_row_and_is_not_valid_is_told_both(bench: Bench) -> None:
    rows: list[dict[str, Any]] = [
        {"name": "Ann", "club": "Nowhere", "age": -1},
        {"name": "Bob", "club": "Nowhere"},
    ]
    job_id = await bench.run(payload(rows, map={"club": "team.name"}))
    both, one = await bench.verdicts(job_id)
    assert (both.code, both.column) == (one.code, one.column) == ("missing_reference", "club")
    assert one.message == "club: there is no team with name 'Nowhere'"
    assert both.message == f"{one.message}; age: Input should be greater than or equal to 0"


async def test_of_a_field_that_must_be_given_only_the_missing_row_is_told(bench: Bench) -> None:
    rows = [{"hero": "a@b.c", "team": "Nowhere", "role": "lead"}]
    mapping = {"hero": "hero.email", "team": "team.name"}
    [bad] = await bench.verdicts(await bench.run(payload(rows, "membership", map=mapping)))
    assert bad.message == (
        "hero: there is no hero with email 'a@b.c'; team: there is no team with name 'Nowhere'"
    )


@pytest.mark.usefixtures("unusual_tables")
async def test_rows_of_one_input_cannot_name_each_other(bench: Bench) -> None:
    rows = [{"id": 1, "name": "a", "above": "b"}]
    message = await refusal(bench, rows, "folder", map={"above": "folder.name"})
    assert "import the parents first, then give parent_id" in message


@pytest.mark.usefixtures("unusual_tables")
async def test_a_reference_takes_the_value_of_the_column_that_its_key_points_to(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await insert(bench, [{"code": "FR", "name": "France"}], "country")
    await insert(bench, [{"code": "V1", "label": "north"}], "vault")
    rows = [{"land": "France", "by": "north"}, {"land": "FR", "by": None}]
    mapping = {"land": "country.name", "by": "issuer.label"}
    assert await rejects(bench, rows, "pass", map=mapping) == [(2, "missing_reference", "land")]
    assert await rows_of(connection, "country, issuer", "pass") == [("FR", "V1")]


# What the Create class adds


@pytest.mark.usefixtures("unusual_tables")
async def test_defaults_and_validators_of_the_create_class_and_of_the_table_all_count(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    rows = [
        {"title": "A b"},
        {"title": "C", "mood": None},
        {"title": "D", "mood": "glad", "rank": 1},
    ]
    assert await insert(bench, rows, "note") == {"inserted": 3}
    assert await rows_of(connection, "title, slug, mood, rank", "note") == [
        ("A b", "a-b", "calm", 3),
        ("C", "c", None, 3),
        ("D", "d", "glad", 1),
    ]


@pytest.mark.usefixtures("unusual_tables")
async def test_a_validator_of_the_whole_row_rejects_it_in_its_own_words(bench: Bench) -> None:
    job_id = await bench.run(payload([{"title": "refuse"}], "note"))
    [bad] = await bench.verdicts(job_id)
    assert (bad.code, bad.column, bad.message) == (
        "invalid",
        None,
        "row: no such title",
    )


@pytest.mark.usefixtures("unusual_tables")
async def test_an_instant_without_a_time_zone_is_asked_for_one(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    rows = [{"since": at} for at in ("2026-01-31T10:00:00", "2026-01-31T10:00:00+01:00")]
    job_id = await bench.run(payload(rows, "visit", map={"since": "began_at"}))
    [bad] = await bench.verdicts(job_id)
    assert (bad.row_no, bad.code, bad.column) == (1, "invalid", "since")
    assert bad.message.startswith("since: needs a time zone, as in 2030-12-31T23:00:00+01:00")
    assert await rows_of(connection, "began_at", "visit") == [
        (datetime(2026, 1, 31, 9, tzinfo=UTC),)
    ]


@EITHER_WAY
@pytest.mark.usefixtures("unusual_tables")
async def test_an_empty_field_is_null_whatever_its_type(
    way: Way, bench: Bench, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    path = tmp_path / "gadgets.csv"
    path.write_text('colour,spec,tags,price,small\nred,,[],,\nblue,"{""a"": 1}","[""x""]",1.50,7\n')
    await bench.run_file(path, way, table="gadget")
    rows = await rows_of(
        connection, "id, colour::text, spec::text, tags, price::text, small", "gadget"
    )
    assert rows == [
        (1, "RED", None, [], None, None),
        (2, "BLUE", '{"a": 1}', ["x"], "1.50", 7),
    ]


# Clashes, limits, and what is counted


CLASHING: list[dict[str, Any]] = [
    {"name": "Ann", "external_id": "A"},
    {"name": "Bob", "external_id": "old"},
    {"name": "Cid", "external_id": "A"},
    {"name": "Dan", "external_id": "deleted"},
    {"name": "Eve", "age": -1},
    {"name": "Fay"},
]


async def _old_heroes(connection: asyncpg.Connection) -> None:
    await connection.execute(
        "INSERT INTO hero (name, external_id, deleted_at)"
        " VALUES ('Old', 'old', NULL), ('Deleted', 'deleted', now())"
    )


@pytest.mark.parametrize("chunk_rows", [1, 2, 100])
async def test_rows_that_clash_are_rejected_with_the_constraint_named(
    chunk_rows: int, bench: Bench, connection: asyncpg.Connection
) -> None:
    await _old_heroes(connection)
    job_id = await bench.run(payload(CLASHING, chunk_rows=chunk_rows))
    assert dict(await bench.counts(job_id)) == {"inserted": 3, "rejected": 3}
    found = await bench.verdicts(job_id)
    assert [(one.row_no, one.code, one.column) for one in found] == [
        (2, "unique_violation", "external_id"),
        (3, "unique_violation", "external_id"),
        (5, "invalid", "age"),
    ]
    assert all("uq_hero_external_id" in one.message for one in found[:2])


@pytest.mark.parametrize("chunk_rows", [1, 2, 100])
async def test_rows_that_clash_are_skipped_on_request_and_others_still_rejected(
    chunk_rows: int, bench: Bench, connection: asyncpg.Connection
) -> None:
    await _old_heroes(connection)
    job_id = await bench.run(payload(CLASHING, chunk_rows=chunk_rows, on_conflict="skip"))
    assert dict(await bench.counts(job_id)) == {"inserted": 3, "skipped": 2, "rejected": 1}
    assert [one.row_no for one in await bench.verdicts(job_id)] == [5]
    names = [name for (name,) in await rows_of(connection, "name")]
    assert names == ["Ann", "Dan", "Deleted", "Fay", "Old"]


@pytest.mark.parametrize("chunk_rows", [1, 3, 4, 100])
@pytest.mark.parametrize(
    ("limit", "counts"),
    [
        ({"on_invalid": "abort"}, {"inserted": 1, "rejected": 1, "not_reached": 5}),
        ({"max_rejects": 0}, {"inserted": 1, "rejected": 1, "not_reached": 5}),
        ({"max_rejects": 1}, {"inserted": 3, "rejected": 2, "not_reached": 2}),
        ({"max_rejects": 2}, {"inserted": 4, "rejected": 3}),
    ],
)
async def test_at_the_reject_too_many_the_job_ends_and_every_row_is_accounted_for(
    limit: dict[str, Any], counts: dict[str, int], chunk_rows: int, bench: Bench
) -> None:
    ages = [1, -1, 2, 3, -2, 4, -3]
    rows = [{"name": "Ann", "age": age, "keep": "yes"} for age in ages]
    rows.insert(3, {"name": "Ann", "age": -1, "keep": "no"})
    request = {"where": {"keep": "yes"}, "chunk_rows": chunk_rows, **limit}
    job_id = await bench.run(payload(rows, **request))
    done = await bench.job(job_id)
    assert (done.state, done.reason) == ("failed", "rejected")
    assert dict(await bench.counts(job_id)) == counts
    assert len(await bench.verdicts(job_id)) == counts["rejected"]


async def test_as_many_rejects_as_allowed_do_not_end_the_job(bench: Bench) -> None:
    rows = [{"name": "Ann", "age": age} for age in (1, -1, -2, 2)]
    assert await insert(bench, rows, max_rejects=2) == {"inserted": 2, "rejected": 2}


@EITHER_WAY
async def test_rejects_keep_exactly_the_bytes_of_their_rows(
    way: Way, bench: Bench, tmp_path: Path
) -> None:
    bad = [b'"Ann\r\nLee", old ,"x"\r\n', b"Bob,\xff,\r", b"Cid,-1,z"]
    path = tmp_path / "heroes.csv"
    path.write_bytes(b"name,age,external_id\r\n" + bad[0] + b"Good,1,\n" + bad[1] + bad[2])
    job_id = await bench.run_file(path, way, table="hero", chunk_rows=2)
    assert [one.raw for one in await bench.verdicts(job_id)] == bad


async def test_rejects_of_inline_rows_keep_the_row_as_it_was_given(bench: Bench) -> None:
    row = {"name": "Zoë", "age": -1, "email": None}
    [bad] = await bench.verdicts(await bench.run(payload([row])))
    assert json.loads(bad.raw or b"") == row


@EITHER_WAY
async def test_importing_a_file_again_inserts_nothing_and_says_so(
    way: Way, bench: Bench, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    path = tmp_path / "heroes.csv"
    path.write_text("name,external_id\n" + "".join(f"Hero {n},{n}\n" for n in range(50)))
    first, second = [
        await bench.run_file(path, way, table="hero", on_conflict="skip", chunk_rows=20)
        for _ in range(2)
    ]
    assert dict(await bench.counts(first)) == {"inserted": 50}
    done = await bench.job(second)
    assert done.outcome == {"rows": 50, "filtered": 0, "verdicts": {"skipped": 50}}
    assert await bench.audit(second) == []
    assert await connection.fetchval("SELECT count(*) FROM hero") == 50


# What is written down


async def test_the_audit_of_a_chunk_covers_exactly_the_rows_of_that_chunk(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    rows = [
        {"name": f"Hero {n}", "external_id": str(n % 25), "age": -1 if n % 7 == 0 else n}
        for n in range(40)
    ]
    job_id = await bench.run(payload(rows, chunk_rows=10, on_conflict="skip"))
    found = await connection.fetch("SELECT id, age FROM hero ORDER BY id")
    covered = {}
    for entry in await bench.audit(job_id):
        ranges = entry["keys"]["ranges"]
        ages = [age for key, age in found if any(low <= key <= high for low, high in ranges)]
        assert (entry["rows"], entry["table_name"]) == (len(ages), "hero")
        covered[entry["chunk_no"]] = ages
    inserted = [n for n in range(40) if n % 7 and (n < 25 or (n - 25) % 7 == 0)]
    assert covered == {
        chunk: [n for n in inserted if n // 10 + 1 == chunk] for chunk in (1, 2, 3, 4)
    }


SECRET = "Natasha-the-Spy"


@EITHER_WAY
async def test_a_sensitive_value_appears_in_no_verdict_log_line_audit_or_error(
    way: Way, bench: Bench, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    await connection.execute("ALTER TABLE hero ADD CHECK (length(secret_name) <> 7)")
    await connection.execute("CREATE UNIQUE INDEX one_secret ON hero (secret_name)")
    rows = [
        f"Ann,{SECRET},5",
        f"Bob,{SECRET},6",
        f"Cid,{SECRET}{'x' * 200},7",
        "Dan,Sleeper,8",
        f"Eve,{SECRET},-1",
    ]
    path = tmp_path / "heroes.csv"
    path.write_text("name,secret_name,age\n" + "\n".join(rows) + "\n")
    with structlog.testing.capture_logs() as logged:
        job_id = await bench.run_file(path, way, table="hero", max_rejects=3)
    found = await bench.verdicts(job_id)
    assert [(one.row_no, one.code) for one in found] == [
        (2, "unique_violation"),
        (3, "invalid"),
        (4, "check_violation"),
        (5, "invalid"),
    ]
    done = await bench.job(job_id)
    assert done.state == "failed"
    told = [logged, [one.message for one in found], await bench.audit(job_id), done]
    assert "Sleeper" not in repr(told)
    assert "Natasha" not in repr(told)


@pytest.mark.usefixtures("unusual_tables")
async def test_a_row_that_is_named_by_a_sensitive_column_is_not_named_in_the_message(
    bench: Bench,
) -> None:
    job_id = await bench.run(payload([{"by": SECRET}], "pass", map={"by": "issuer.pin"}))
    [bad] = await bench.verdicts(job_id)
    assert bad.message == "by: there is no vault with pin ***"


@pytest.mark.usefixtures("unusual_tables")
async def test_a_sensitive_value_that_a_validator_quotes_is_masked(bench: Bench) -> None:
    job_id = await bench.run(payload([{"title": "tell", "secret": SECRET}], "note"))
    [bad] = await bench.verdicts(job_id)
    assert bad.message == "row: *** is no secret"
