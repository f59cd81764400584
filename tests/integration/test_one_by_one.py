"""The outcome of a bulk insert is that of inserting its rows one by one, whatever the chunks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from db.models.hero import HeroCreate
from jobs.insert_rows import InsertRows
from tests.inprocess import Bench

RULES = """
    ALTER TABLE hero ADD CONSTRAINT ck_hero_not_thirteen CHECK (age <> 13);
    INSERT INTO team (id, name, deleted_at) OVERRIDING SYSTEM VALUE
        VALUES (1, 'Red', NULL), (2, 'Blue', NULL), (3, 'Gone', now());
"""
TRIGGER = """
    CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {} RETURN NEW; END $$;
    CREATE TRIGGER meddle BEFORE INSERT ON hero FOR EACH ROW EXECUTE FUNCTION meddle();
"""
REFUSE = "IF NEW.name = 'Loki' THEN RAISE EXCEPTION 'no Loki here'; END IF;"
LEAVE_OUT = "IF NEW.name = 'Loki' THEN RETURN NULL; END IF;"
REKEY = """
    NEW.id := CASE WHEN NEW.name = 'Ann' AND NEW.age = 40 THEN 1
                   ELSE (SELECT coalesce(max(id), 0) + 1 FROM hero) END;
"""
TRIGGERS = {
    "plain": "",
    "refusing": TRIGGER.format(REFUSE),
    "leaving rows out": TRIGGER.format(LEAVE_OUT),
    "changing keys": TRIGGER.format(REKEY),
    "leaving rows out and changing keys": TRIGGER.format(LEAVE_OUT + REKEY),
}
RESET = """
    TRUNCATE hero RESTART IDENTITY CASCADE;
    INSERT INTO hero (name, email, external_id, deleted_at)
        VALUES ('Old', 'a@x.org', 'A', NULL), ('Hidden', 'b@x.org', 'B', now());
"""
COLUMNS = ("name", "age", "email", "external_id", "team_id", "club")

rows_of_input = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from(["Ann", "Bob", "Loki", "", None]),
            "age": st.sampled_from([None, 0, 13, 40, -1, "old"]),
            "email": st.sampled_from([None, "a@x.org", "b@x.org", "c@x.org", "broken"]),
            "external_id": st.sampled_from([None, "A", "B", "C", "D"]),
            "club": st.sampled_from([None, "Red", "Blue", "Gone", "Nowhere"]),
        }
    ),
    max_size=30,
)
rows_with_ids = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from(["Ann", "Bob"]),
            "age": st.sampled_from([None, 13, 40]),
            "email": st.sampled_from([None, "a@x.org", "b@x.org", "c@x.org"]),
            "external_id": st.sampled_from([None, "A", "B", "C"]),
            "team_id": st.sampled_from([None, 1, 3, 77]),
        }
    ),
    max_size=30,
)


@dataclass
class Told:
    """What the reference did, row by row."""

    counts: Counter[str] = field(default_factory=Counter)
    rejected: list[tuple[int, str, str | None]] = field(default_factory=list)


async def insert_one_by_one(
    connection: asyncpg.Connection,
    rows: Sequence[dict[str, Any]],
    on_conflict: str,
    limit: int | None,
) -> Told:
    """The reference: plain INSERTs in savepoints, with PostgreSQL's own word for each refusal."""
    told = Told()
    async with connection.transaction():
        for number, row in enumerate(rows, 1):
            if limit is not None and len(told.rejected) > limit:
                told.counts["not_reached"] += 1
                continue
            why = await _insert(connection, dict(row), on_conflict)
            if why is None or why == ("skipped", None):
                told.counts["inserted" if why is None else "skipped"] += 1
            else:
                told.counts["rejected"] += 1
                told.rejected.append((number, *why))
    return told


async def _insert(
    connection: asyncpg.Connection, row: dict[str, Any], on_conflict: str
) -> tuple[str, str | None] | None:
    club = row.pop("club", None)
    if club is not None:
        row["team_id"] = await connection.fetchval(
            "SELECT id FROM team WHERE name = $1 AND deleted_at IS NULL", club
        )
        if row["team_id"] is None:
            return "missing_reference", None
    try:
        hero = HeroCreate.model_validate(row)
    except ValidationError:
        return "invalid", None
    values = hero.model_dump()
    marks = ", ".join(f"${n}" for n in range(1, len(values) + 1))
    try:
        async with connection.transaction():
            done = await connection.execute(
                f"INSERT INTO hero ({', '.join(values)}) VALUES ({marks})", *values.values()
            )
    except asyncpg.UniqueViolationError as error:
        if on_conflict == "skip":
            return "skipped", None
        return "unique_violation", error.constraint_name
    except asyncpg.ForeignKeyViolationError as error:
        return "foreign_key_violation", error.constraint_name
    except asyncpg.CheckViolationError as error:
        return "check_violation", error.constraint_name
    except asyncpg.RaiseError:
        return "trigger_exception", None
    if done == "INSERT 0 0":
        return ("skipped" if on_conflict == "skip" else "suppressed"), None
    return None


async def table(connection: asyncpg.Connection) -> list[tuple[Any, ...]]:
    """All heroes in the order in which they were inserted, without what no rule decides."""
    rows = await connection.fetch(
        "SELECT name, age, email, external_id, team_id, deleted_at IS NULL FROM hero ORDER BY id"
    )
    return [tuple(row) for row in rows]


@pytest.fixture
async def connection(connection: asyncpg.Connection) -> asyncpg.Connection:
    await connection.execute(RULES)
    return connection


async def _same(
    connection: asyncpg.Connection, bench: Bench, rows: list[dict[str, Any]], **request: Any
) -> None:
    limit = 0 if request.get("on_invalid") == "abort" else request.get("max_rejects")
    await connection.execute(RESET)
    told = await insert_one_by_one(connection, rows, request["on_conflict"], limit)
    expected = await table(connection)

    await connection.execute(RESET)
    mapping = {"club": "team.name"} if rows and "club" in rows[0] else {}
    job_id = await bench.run(InsertRows(table="hero", rows=rows, map=mapping, **request))

    done = await bench.job(job_id)
    verdicts = await bench.verdicts(job_id)
    async with bench.sessions() as session:
        from db.ledger.chunk import tally

        counts = dict((await tally(session, job_id)).counts)
    too_many = limit is not None and told.counts["rejected"] > limit
    assert done.state == ("failed" if too_many else "succeeded"), done.error
    assert counts == {name: count for name, count in told.counts.items() if count}
    assert [(one.row_no, one.code) for one in verdicts] == [
        (number, code) for number, code, _ in told.rejected
    ]
    for one, (_, _, constraint) in zip(verdicts, told.rejected, strict=True):
        assert constraint is None or f"({constraint})" in one.message
    assert await table(connection) == expected
    await _audited(connection, bench, job_id)


async def _audited(connection: asyncpg.Connection, bench: Bench, job_id: UUID) -> None:
    """The key ranges of each audit line hold as many rows as it says, and all of them every row."""
    told = 0
    for entry in await bench.audit(job_id):
        held = [
            await connection.fetchval("SELECT count(*) FROM hero WHERE id BETWEEN $1 AND $2", *pair)
            for pair in entry["keys"]["ranges"]
        ]
        assert sum(held) == entry["rows"]
        told += sum(held)
    assert told == await connection.fetchval("SELECT count(*) - 2 FROM hero")


slow_is_fine = settings(
    max_examples=60,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # an example is a job: slow to shrink
)


@pytest.mark.parametrize("trigger", TRIGGERS.values(), ids=TRIGGERS.keys())
@slow_is_fine
@given(
    rows=rows_of_input,
    chunk_rows=st.integers(1, 50),
    on_conflict=st.sampled_from(["reject", "skip"]),
    max_rejects=st.none() | st.integers(0, 6),
)
async def test_any_chunk_size_gives_what_inserting_one_by_one_gives(
    connection: asyncpg.Connection,
    bench: Bench,
    trigger: str,
    rows: list[dict[str, Any]],
    chunk_rows: int,
    on_conflict: str,
    max_rejects: int | None,
) -> None:
    await connection.execute("DROP FUNCTION IF EXISTS meddle CASCADE;" + trigger)
    await _same(
        connection,
        bench,
        rows,
        chunk_rows=chunk_rows,
        on_conflict=on_conflict,
        max_rejects=max_rejects,
    )


@slow_is_fine
@given(
    rows=rows_with_ids,
    chunk_rows=st.integers(1, 50),
    on_conflict=st.sampled_from(["reject", "skip"]),
    on_invalid=st.sampled_from(["reject", "abort"]),
)
async def test_rows_that_only_the_database_refuses_are_refused_alone_and_by_name(
    connection: asyncpg.Connection,
    bench: Bench,
    rows: list[dict[str, Any]],
    chunk_rows: int,
    on_conflict: str,
    on_invalid: str,
) -> None:
    await _same(
        connection,
        bench,
        rows,
        chunk_rows=chunk_rows,
        on_conflict=on_conflict,
        on_invalid=on_invalid,
    )
