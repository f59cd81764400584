"""update_rows: the same values for keys or a filter, or a patch for each row."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa

from jobs.insert_rows import InsertRows
from jobs.restore_rows import RestoreRows
from jobs.soft_delete_rows import SoftDeleteRows
from jobs.update_rows import UpdateRows
from tests.inprocess import Bench

Rows = list[dict[str, Any]]
HEROES: Rows = [
    {"external_id": f"h{n}", "name": f"Hero {n}", "age": 20 + n, "email": f"h{n}@x.org"}
    for n in range(6)
]


@pytest.fixture
async def heroes(bench: Bench) -> Bench:
    """A worker on a database with six heroes, h0 to h5, whose ids begin at 1."""
    await bench.run(InsertRows(table="hero", rows=HEROES))
    return bench


async def update(bench: Bench, **request: Any) -> tuple[Mapping[str, int], UUID]:
    job_id = await bench.run(UpdateRows(table="hero", **request))
    done = await bench.job(job_id)
    assert done.state == "succeeded", done.error
    return await bench.counts(job_id), job_id


async def refusal(bench: Bench, **request: Any) -> str:
    """Why the job was rejected; nothing may have changed then."""
    before = await table(bench)
    job_id = await bench.run(UpdateRows(table="hero", **request))
    done = await bench.job(job_id)
    assert (done.state, done.reason) == ("failed", "rejected")
    assert await table(bench) == before
    error: str = done.error
    return error


async def table(
    bench: Bench, columns: str = "*", order: str = "id"
) -> Sequence[sa.Row[*tuple[Any, ...]]]:
    async with bench.sessions() as session:
        return (
            await session.execute(sa.text(f"SELECT {columns} FROM hero ORDER BY {order}"))
        ).all()


async def test_the_same_values_go_to_many_keys(heroes: Bench) -> None:
    counts, job_id = await update(heroes, keys=[1, 4, 99], values={"age": 23})
    assert counts == {"updated": 1, "unchanged": 1, "missing": 1}
    assert [row.age for row in await table(heroes)] == [23, 21, 22, 23, 24, 25]
    [missing] = await heroes.verdicts(job_id)
    assert (missing.row_no, missing.verdict, missing.code) == (3, "missing", "no_such_row")


async def test_only_rows_that_changed_get_a_new_version_and_time(heroes: Bench) -> None:
    before = await table(heroes, "id, version, updated_at")
    await update(heroes, keys=[1, 4], values={"age": 23})
    after = await table(heroes, "id, version, updated_at")
    assert [one.id for one, other in zip(before, after, strict=True) if one != other] == [1]
    assert after[0].version == before[0].version + 1
    assert after[0].updated_at > before[0].updated_at


async def test_a_patch_leaves_what_is_absent_and_nulls_what_is_null(heroes: Bench) -> None:
    rows: Rows = [{"id": 1, "age": None}, {"id": 2, "email": None}, {"id": 3, "name": "Zoe"}]
    counts, _ = await update(heroes, rows=rows)
    assert counts == {"updated": 3}
    found = [tuple(row)[1:] for row in await table(heroes, "id, name, age, email")][:3]
    assert found == [
        ("Hero 0", None, "h0@x.org"),
        ("Hero 1", 21, None),
        ("Zoe", 22, "h2@x.org"),
    ]


async def test_rows_are_named_by_a_natural_key(heroes: Bench) -> None:
    counts, _ = await update(heroes, rows=[{"external_id": "h4", "age": 1}])
    assert counts == {"updated": 1}
    assert (await table(heroes))[4].age == 1


async def test_of_several_keys_one_has_to_be_named(heroes: Bench) -> None:
    rows = [{"external_id": "h4", "email": "new@x.org"}]
    said = await refusal(heroes, rows=rows)
    assert "name one with --key: id; email; external_id" in said
    counts, _ = await update(heroes, rows=rows, key=["external_id"])
    assert counts == {"updated": 1}
    assert (await table(heroes))[4].email == "new@x.org"


async def test_a_filter_selects_what_is_there_at_the_first_run(heroes: Bench) -> None:
    counts, _ = await update(
        heroes, filter={"age": {"ge": 22, "lt": 25}}, values={"age": 23}, chunk_rows=1
    )
    assert counts == {"updated": 2, "unchanged": 1}
    assert [row.age for row in await table(heroes)] == [20, 21, 23, 23, 23, 25]


@pytest.mark.parametrize(
    ("given", "ages"),
    [
        ({"age": None}, []),
        ({"name": ["Hero 1", "Hero 2"]}, [21, 22]),
        ({"name": {"like": "Hero %"}, "age": {"not_in": [20, 25]}}, [21, 22, 23, 24]),
        ({"email": {"ne": None}, "id": {"le": 2}}, [20, 21]),
        ({"age": [20, None]}, [20]),
    ],
)
async def test_a_filter_means_what_it_says(
    heroes: Bench, given: dict[str, Any], ages: list[int]
) -> None:
    await update(heroes, filter=given, values={"name": "found"})
    assert [row.age for row in await table(heroes) if row.name == "found"] == ages


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"keys": [1], "values": {"team_id": 1}}, "hero.team_id is changed by transfer_heroes"),
        ({"keys": [1], "values": {"agee": 1}}, "hero has no field 'agee'; did you mean 'age'?"),
        ({"keys": [1], "values": {"age": -1}}, "--set age: "),
        ({"keys": [1], "values": {"name": None}}, "--set name: "),
        ({"filter": {"agee": 1}, "values": {"age": 1}}, "no column 'agee'; did you mean 'age'?"),
        ({"filter": {"age": {"le_": 1}}, "values": {"age": 1}}, "unknown operator 'le_'"),
        ({"filter": {"age": "old"}, "values": {"age": 1}}, "--filter age: "),
        ({"filter": {"id": 2**70}, "values": {"age": 1}}, "--filter id: "),
        ({"filter": {"id": {"in": [*range(10_001)]}}, "values": {"age": 1}}, "at most 10000 may"),
        (
            {"filter": {"age": {"like": "1%"}}, "values": {"age": 1}},
            "like compares a column",
        ),
        ({"filter": {"name": {"like": 5}}, "values": {"age": 1}}, "like compares a column"),
        (
            {"filter": {"created_at": {"gt": "2026-01-01T00:00:00"}}, "values": {"age": 1}},
            "--filter created_at: needs a time zone",
        ),
        (
            {"filter": {"created_at": {"gt": "9999-12-31T23:59:59-14:00"}}, "values": {"age": 1}},
            "--filter created_at: cannot be stored",
        ),
        ({"rows": [{"name": "Zoe"}]}, "the input gives no key of hero; name one with --key"),
        ({"rows": [{"id": 1}]}, "nothing but the key of hero is given"),
        ({"rows": [{"id": 1, "age": 2}], "key": ["name"]}, "--key: name is no unique key of hero"),
    ],
)
async def test_what_cannot_be_done_is_said_in_one_sentence(
    heroes: Bench, request_: dict[str, Any], said: str
) -> None:
    assert said in await refusal(heroes, **request_)


async def test_more_rows_than_allowed_change_nothing(heroes: Bench) -> None:
    said = await refusal(heroes, filter={"age": {"gt": 0}}, values={"age": 1}, max_rows=5)
    assert "the input has 6 rows and at most 5 may be written" in said


async def test_a_dry_run_tells_what_would_be_and_changes_nothing(heroes: Bench) -> None:
    before = await table(heroes)
    rows: Rows = [
        {"id": 1, "age": 7},
        {"id": 2, "age": 21},
        {"id": 9, "age": 1},
        {"id": 3, "age": -1},
    ]
    counts, job_id = await update(heroes, rows=rows, dry_run=True, chunk_rows=1)
    assert counts == {"updated": 1, "unchanged": 1, "missing": 1, "rejected": 1}
    assert await table(heroes) == before
    assert await heroes.audit(job_id) == []
    assert [one.row_no for one in await heroes.verdicts(job_id)] == [3, 4]


async def test_an_atomic_update_with_a_missing_row_changes_nothing(heroes: Bench) -> None:
    rows: Rows = [{"id": 1, "age": 7}, {"id": 99, "age": 1}]
    said = await refusal(heroes, rows=rows, atomic=True)
    assert "nothing was written" in said


async def test_the_audit_tells_what_was_there_before(heroes: Bench) -> None:
    await update(heroes, keys=[2], values={"age": 50})
    _, job_id = await update(heroes, rows=[{"id": 2, "age": None, "name": "Zoe"}])
    [line] = await heroes.audit(job_id)
    assert line["action"] == "update"
    assert line["keys"] == {"keys": [[2]]}
    assert line["before"] == {"age": 50, "name": "Hero 1"}
    assert line["version"] == 2


async def test_another_version_than_expected_is_a_conflict(heroes: Bench) -> None:
    rows: Rows = [{"id": 1, "age": 7, "v": 1}, {"id": 2, "age": 7, "v": 2}]
    counts, job_id = await update(heroes, rows=rows, expect_version="v")
    assert counts == {"updated": 1, "conflict": 1}
    assert [one.code for one in await heroes.verdicts(job_id)] == ["version_conflict"]


async def test_a_deleted_row_is_missing(heroes: Bench) -> None:
    async with heroes.sessions.begin() as session:
        await session.execute(sa.text("UPDATE hero SET deleted_at = now() WHERE id = 1"))
    counts, _ = await update(heroes, rows=[{"id": 1, "age": 1}, {"id": 2, "age": 1}])
    assert counts == {"missing": 1, "updated": 1}


async def test_values_may_be_swapped_only_if_that_works_one_by_one(heroes: Bench) -> None:
    rows: Rows = [
        {"id": 1, "email": "h1@x.org"},
        {"id": 2, "email": "free@x.org"},
        {"id": 3, "email": "h1@x.org"},
    ]
    counts, job_id = await update(heroes, rows=rows, key=["id"])
    assert counts == {"rejected": 1, "updated": 2}
    assert [one.row_no for one in await heroes.verdicts(job_id)] == [1]
    found = [row.email for row in await table(heroes)][:3]
    assert found == ["h0@x.org", "free@x.org", "h1@x.org"]


async def test_a_file_of_patches_may_change_constants_too(heroes: Bench, tmp_path: Path) -> None:
    file = tmp_path / "ages.csv"
    file.write_text("id,age\n1,40\n2,\n")
    heroes.import_folders.append(tmp_path)
    source = {"type": "in_place", "path": str(file)}
    counts, _ = await update(heroes, source=source, values={"name": "Same"})
    assert counts == {"updated": 2}
    assert [(row.name, row.age) for row in await table(heroes)][:2] == [
        ("Same", 40),
        ("Same", None),
    ]


async def test_rows_are_changed_deleted_and_restored_by_natural_keys_of_other_tables(
    heroes: Bench,
) -> None:
    await heroes.run(InsertRows(table="team", rows=[{"name": "Red"}, {"name": "Blue"}]))
    names = {"of": "hero.external_id", "in": "team.name"}
    roles: Rows = [{"of": f"h{n}", "in": "Red", "role": "scout"} for n in range(3)]
    made = await heroes.run(InsertRows(table="membership", rows=roles, map=names))
    moves: Rows = [{"id": 1, "in": "Blue"}, {"id": 2, "in": "Red"}, {"id": 3, "in": "Pink"}]
    moved = await heroes.run(UpdateRows(table="membership", rows=moves, map={"in": "team.name"}))
    key: dict[str, Any] = {"map": names, "key": ["hero_id", "team_id", "role"]}
    roles[0]["in"] = "Blue"
    deleted = await heroes.run(SoftDeleteRows(table="membership", rows=roles, **key))
    restored = await heroes.run(RestoreRows(table="membership", rows=roles, **key))

    assert await heroes.counts(made) == {"inserted": 3}
    assert await heroes.counts(moved) == {"updated": 1, "unchanged": 1, "rejected": 1}
    assert [one.code for one in await heroes.verdicts(moved)] == ["missing_reference"]
    assert await heroes.counts(deleted) == {"deleted": 3}
    assert await heroes.counts(restored) == {"restored": 3}
