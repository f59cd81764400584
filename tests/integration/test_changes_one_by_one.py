"""Changes in chunks of any size end as if the rows were changed one by one."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from jobs.restore_rows import RestoreRows
from jobs.soft_delete_rows import SoftDeleteRows
from jobs.update_rows import UpdateRows
from tests.inprocess import Bench
from tests.stage import connected

pytestmark = pytest.mark.once

Row = dict[str, Any]
CODES: dict[type[asyncpg.PostgresError], str] = {
    asyncpg.NotNullViolationError: "not_null_violation",
    asyncpg.UniqueViolationError: "unique_violation",
    asyncpg.ForeignKeyViolationError: "foreign_key_violation",
    asyncpg.CheckViolationError: "check_violation",
}
HEROES = 6
SETUP = f"""
    TRUNCATE team, hero, membership, transfer RESTART IDENTITY CASCADE;
    INSERT INTO team (name) VALUES ('A'), ('B');
    INSERT INTO hero (name, email, external_id, deleted_at)
    SELECT 'Hero ' || n, 'e@' || n, 'x' || n, CASE WHEN n % 3 = 0 THEN now() END
      FROM generate_series(1, {HEROES}) AS n;
    INSERT INTO membership (hero_id, team_id, role)
    SELECT 1 + n % {HEROES}, 1 + n % 2, 'role ' || n / 4 FROM generate_series(0, 9) AS n;
"""
HERO_VALUES = {
    "name": st.sampled_from(["Ann", "Bob"]),
    "email": st.sampled_from([None, "e@1", "e@2", "e@4", "e@9"]),
    "external_id": st.sampled_from([None, "x1", "x2", "x9"]),
}
ROLE_VALUES = {
    "hero_id": st.sampled_from([1, 2, 3, 99]),
    "team_id": st.sampled_from([1, 2]),
    "role": st.sampled_from(["role 0", "role 1", "role 2"]),
}


@dataclass(frozen=True)
class Kind:
    """A table, its columns to change, and the keys by which its rows may be named."""

    table: str
    values: dict[str, st.SearchStrategy[Any]]
    keys: dict[str, st.SearchStrategy[Any]]


KINDS = (
    Kind(
        "hero",
        HERO_VALUES,
        {
            "id": st.integers(1, HEROES + 1),
            "external_id": st.sampled_from(["x1", "x2", "x4", "x9"]),
        },
    ),
    Kind("membership", ROLE_VALUES, {"id": st.integers(1, 11)}),
)


@st.composite
def updates(draw: st.DrawFn) -> tuple[Kind, str, list[Row]]:
    kind = draw(st.sampled_from(KINDS))
    key = draw(st.sampled_from(sorted(kind.keys)))
    patch = st.fixed_dictionaries(
        {key: kind.keys[key]},
        optional={name: values for name, values in kind.values.items() if name != key},
    )
    rows = draw(st.lists(patch, min_size=1, max_size=10))
    rows.append({key: draw(kind.keys[key]), **draw(_every_other(kind, key))})
    return kind, key, rows


def _every_other(kind: Kind, key: str) -> st.SearchStrategy[Row]:
    return st.fixed_dictionaries({name: one for name, one in kind.values.items() if name != key})


async def one_by_one(
    connection: asyncpg.Connection, kind: Kind, key: str, rows: Sequence[Row]
) -> tuple[Counter[str], list[tuple[int, str]]]:
    """Plain SQL, a savepoint for each row."""
    counts: Counter[str] = Counter()
    refused = []
    for number, row in enumerate(rows, 1):
        values = {name: value for name, value in row.items() if name != key}
        try:
            async with connection.transaction():
                verdict = await _apply(connection, kind.table, key, row[key], values)
        except tuple(CODES) as error:
            verdict = "rejected"
            refused.append((number, CODES[type(error)]))
        if verdict == "missing":
            refused.append((number, "no_such_row"))
        counts[verdict] += 1
    return counts, refused


async def _apply(
    connection: asyncpg.Connection, table: str, key: str, value: Any, values: Row
) -> str:
    found = await connection.fetchrow(
        f"SELECT * FROM {table} WHERE {key} = $1 AND deleted_at IS NULL", value
    )
    if found is None:
        return "missing"
    if all(found[name] == new for name, new in values.items()):
        return "unchanged"
    setting = ", ".join(f"{name} = ${n}" for n, name in enumerate(values, 2))
    await connection.execute(
        f"UPDATE {table} SET {setting}, version = version + 1 WHERE id = $1",
        found["id"],
        *values.values(),
    )
    return "updated"


async def content(connection: asyncpg.Connection, table: str) -> list[Row]:
    rows = await connection.fetch(f"SELECT * FROM {table} ORDER BY id")
    moments = ("created_at", "updated_at", "deleted_at")
    return [
        {name: (value is None if name in moments else value) for name, value in row.items()}
        for row in rows
    ]


@settings(
    max_examples=30,
    phases=[Phase.explicit, Phase.generate],
)
@given(asked=updates(), chunk_rows=st.sampled_from([1, 3, 100]))
async def test_patches_end_as_one_by_one(
    database_url: str,
    sessions: async_sessionmaker[AsyncSession],
    asked: tuple[Kind, str, list[Row]],
    chunk_rows: int,
) -> None:
    kind, key, rows = asked
    bench = Bench(sessions, database_url)
    async with connected(database_url) as connection:
        await connection.execute(SETUP)
        expected, refused = await one_by_one(connection, kind, key, rows)
        left = await content(connection, kind.table)
        await connection.execute(SETUP)
        job_id = await bench.run(
            UpdateRows(table=kind.table, rows=rows, key=[key], chunk_rows=chunk_rows)
        )
        found = await content(connection, kind.table)
    done = await bench.job(job_id)
    assert done.state == "succeeded", done.error
    assert [(one.row_no, one.code) for one in await bench.verdicts(job_id)] == refused
    assert await bench.counts(job_id) == expected
    assert found == left
    changed = [line for line in await bench.audit(job_id) if line["action"] == "update"]
    assert len(changed) == expected["updated"]


@settings(
    max_examples=12,
    phases=[Phase.explicit, Phase.generate],
)
@given(
    keys=st.lists(st.integers(1, HEROES + 1), min_size=1, max_size=8),
    restored=st.lists(st.integers(1, HEROES + 1), min_size=1, max_size=8),
    table=st.sampled_from(["hero", "team"]),
)
async def test_deletes_and_restores_do_not_depend_on_the_chunk_size(
    database_url: str,
    sessions: async_sessionmaker[AsyncSession],
    keys: list[int],
    restored: list[int],
    table: str,
) -> None:
    bench = Bench(sessions, database_url)
    ends = []
    async with connected(database_url) as connection:
        for chunk_rows in (1, 100):
            await connection.execute(SETUP)
            end = []
            for payload in (
                SoftDeleteRows(table=table, keys=[*keys], chunk_rows=chunk_rows),
                RestoreRows(table=table, keys=[*restored], chunk_rows=chunk_rows),
            ):
                job_id = await bench.run(payload)
                told = await bench.verdicts(job_id)
                end.append((await bench.counts(job_id), [(one.row_no, one.code) for one in told]))
            everything = [await content(connection, one) for one in ("team", "hero", "membership")]
            ends.append((end, everything))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("chunk_rows", [1, 100])
async def test_each_patch_of_one_row_is_a_change_of_its_own(
    bench: Bench, database_url: str, chunk_rows: int
) -> None:
    async with connected(database_url) as connection:
        await connection.execute(SETUP)
    rows: list[Any] = [{"id": 1, "name": name} for name in ("Ann", "Bob", "Bob", "Cy")]
    job_id = await bench.run(UpdateRows(table="hero", rows=rows, chunk_rows=chunk_rows))
    assert await bench.counts(job_id) == {"updated": 3, "unchanged": 1}
    lines = await bench.audit(job_id)
    assert [(line["before"], line["version"]) for line in lines] == [
        ({"name": "Hero 1"}, 1),
        ({"name": "Ann"}, 2),
        ({"name": "Bob"}, 3),
    ]
