"""An import that updates, revives and creates ends as if its rows were applied one by one."""

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from db.models.hero import HeroCreate
from db.models.team import TeamCreate
from db.registry import discover_models
from jobs.insert_rows import InsertRows
from tests import unusual_models
from tests.inprocess import Bench
from tests.stage import connected, waiting_for_a_lock
from tests.workers import until

pytestmark = pytest.mark.once

Row = dict[str, Any]
CODES: dict[type[asyncpg.PostgresError], str] = {
    asyncpg.NotNullViolationError: "not_null_violation",
    asyncpg.UniqueViolationError: "unique_violation",
    asyncpg.ForeignKeyViolationError: "foreign_key_violation",
    asyncpg.CheckViolationError: "check_violation",
    asyncpg.RaiseError: "trigger_exception",
}
CONFLICTS = ("ambiguous_match", "version_conflict")
PASSED_OVER = ("unique_violation", "suppressed")


@dataclass(frozen=True)
class Kind:
    """A table for the reference: `meets` is a condition on its row `t` and the given row `r`."""

    table: str
    create: type[BaseModel]
    key: tuple[str, ...]
    meets: str
    soft: bool = False

    @property
    def key_sql(self) -> str:
        return ", ".join(f"t.{name}" for name in self.key)


HERO = Kind(
    "hero", HeroCreate, ("id",), "t.email = r.email OR t.external_id = r.external_id", soft=True
)
ACCOUNT = Kind(
    "account",
    unusual_models.AccountCreate,
    ("id",),
    "lower(t.email) = lower(r.email) OR t.code IS NOT DISTINCT FROM r.code"
    " OR t.active AND r.active AND t.handle = r.handle",
)
SEAT = Kind(
    "seat",
    unusual_models.SeatCreate,
    ("hall", "number"),
    "(t.hall, t.number) = (r.hall, r.number) OR t.guest = r.guest",
)
ITEM = Kind("item", unusual_models.ItemCreate, ("id",), "t.total = r.count * r.price")


class Request(NamedTuple):
    """What an import does about rows that meet others, deleted rows, and missing teams."""

    on_conflict: str = "update"
    on_deleted: str = "insert"
    on_missing: str = "reject"
    update: list[str] | None = None


class Change(NamedTuple):
    """What the audit has to say about a row that was there."""

    action: str
    key: tuple[Any, ...]
    before: Row


@dataclass
class Told:
    """What became of the rows, one by one."""

    counts: Counter[str] = field(default_factory=Counter)
    refused: list[tuple[int, str]] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    table: list[Row] = field(default_factory=list)
    teams: list[str] = field(default_factory=list)


class Refused(Exception):
    """The row takes no effect, for this reason."""


# The reference: plain SQL, one row at a time


class Reference:
    """Applies single rows to a table, each in a savepoint."""

    def __init__(self, connection: asyncpg.Connection, kind: Kind, request: Request) -> None:
        self._connection = connection
        self._kind = kind
        self._request = request
        self._told = Told()

    async def apply(self, rows: Sequence[Row]) -> Told:
        for number, row in enumerate(rows, 1):
            try:
                async with self._connection.transaction():
                    verdict = await self._apply(dict(row))
            except Refused as why:
                verdict = self._refused(number, str(why))
            except tuple(CODES) as error:
                verdict = self._refused(number, CODES[type(error)])
            self._told.counts[verdict] += 1
        return self._told

    def _refused(self, number: int, code: str) -> str:
        if code in PASSED_OVER and self._request.on_conflict == "skip":
            return "skipped"
        self._told.refused.append((number, code))
        return "conflict" if code in CONFLICTS else "rejected"

    async def _apply(self, row: Row) -> str:
        seen = row.pop("seen", None)
        created = await self._resolve_team(row)
        try:
            valid = self._kind.create.model_validate(row)
        except ValidationError:
            raise Refused("invalid") from None
        if seen == "new":
            raise Refused("invalid")
        values = {
            name: value
            for name, value in valid.model_dump().items()
            if value is not None or name in valid.model_fields_set
        }
        verdict = await self._merge(values, valid.model_fields_set & values.keys(), seen)
        if created is not None:
            await self._connection.execute(
                "DELETE FROM team WHERE id = $1 AND NOT EXISTS "
                "(SELECT FROM hero WHERE team_id = $1)",
                created,
            )
        return verdict

    async def _resolve_team(self, row: Row) -> int | None:
        """Put the team's id in the place of its name; return it if the team was created."""
        if "club" not in row:
            return None
        club = row.pop("club")
        row["team_id"] = await self._connection.fetchval(
            "SELECT id FROM team WHERE name = $1 AND deleted_at IS NULL", club
        )
        if row["team_id"] is not None or club is None or self._request.on_missing == "null":
            return None
        if self._request.on_missing == "reject":
            raise Refused("missing_reference")
        try:
            TeamCreate.model_validate({"name": club})
        except ValidationError:
            raise Refused("missing_reference") from None
        created: int = await self._connection.fetchval(
            "INSERT INTO team (name) VALUES ($1) RETURNING id", club
        )
        row["team_id"] = created
        return created

    async def _merge(self, values: Row, given: set[str], seen: int | None) -> str:
        live = await self._met(values, "t.deleted_at IS NULL" if self._kind.soft else "true")
        deleted = []
        if self._kind.soft and not live and self._request.on_deleted != "insert":
            deleted = await self._met(values, "t.deleted_at IS NOT NULL")
        if deleted and self._request.on_deleted == "reject":
            raise Refused("deleted_match")
        if deleted:
            await self._expect(deleted[0], seen)
            return await self._revive(deleted[0], values, given)
        if self._request.on_conflict != "update" or not live:
            if self._request.on_conflict == "update" and seen is not None:
                raise Refused("version_conflict")
            return await self._insert(values)
        if len(live) > 1:
            raise Refused("ambiguous_match")
        await self._expect(live[0], seen)
        chosen = given if self._request.update is None else given & set(self._request.update)
        return await self._update(live[0], values, chosen)

    async def _met(self, values: Row, condition: str) -> list[Row]:
        """The rows that the values meet, the one deleted last first."""
        order = f"t.deleted_at DESC, {self._kind.key_sql} DESC" if self._kind.soft else "1"
        found = await self._connection.fetch(
            f"SELECT to_jsonb(t) AS row FROM {self._kind.table} AS t, {self._record()} AS r "
            f"WHERE {condition} AND ({self._kind.meets}) ORDER BY {order}",
            json.dumps(values),
        )
        return [json.loads(one["row"]) for one in found]

    def _record(self) -> str:
        return f"jsonb_populate_record(NULL::{self._kind.table}, $1)"

    async def _expect(self, met: Row, seen: int | None) -> None:
        if seen is not None and met["version"] != seen:
            raise Refused("version_conflict")

    async def _insert(self, values: Row) -> str:
        names = ", ".join(values)
        done = await self._connection.execute(
            f"INSERT INTO {self._kind.table} ({names}) SELECT {names} FROM {self._record()}",
            json.dumps(values),
        )
        if done == "INSERT 0 0":
            raise Refused("suppressed")
        return "inserted"

    async def _update(self, met: Row, values: Row, chosen: set[str]) -> str:
        new = {
            name: values[name] for name in chosen - set(self._kind.key) if met[name] != values[name]
        }
        if not new:
            return "unchanged"
        await self._write(met, new)
        self._note("update", met, new)
        return "updated"

    async def _revive(self, met: Row, values: Row, given: set[str]) -> str:
        new = {name: values[name] for name in given if met[name] != values[name]}
        new["deleted_at"] = None
        await self._write(met, new)
        self._note("revive", met, new)
        return "revived"

    async def _write(self, met: Row, new: Row) -> None:
        values = [f"{name} = r.{name}" for name in new]
        if "version" in met:
            values.append("version = t.version + 1")
        same = " AND ".join(f"t.{name} = k.{name}" for name in self._kind.key)
        await self._connection.execute(
            f"UPDATE {self._kind.table} AS t SET {', '.join(values)} FROM {self._record()} AS r, "
            f"jsonb_populate_record(NULL::{self._kind.table}, $2) AS k WHERE {same}",
            json.dumps(new),
            json.dumps(met),
        )

    def _note(self, action: str, met: Row, new: Row) -> None:
        key = tuple(met[name] for name in self._kind.key)
        self._told.changes.append(Change(action, key, {name: met[name] for name in new}))


# What is there, without times, computed columns, and which numbers ids have


async def read_table(connection: asyncpg.Connection, kind: Kind) -> list[Row]:
    rows = await connection.fetch(
        f"SELECT to_jsonb(t) - '{{created_at,updated_at,total}}'::text[] AS row "
        f"FROM {kind.table} AS t ORDER BY {kind.key_sql}"
    )
    return [json.loads(one["row"]) for one in rows]


class Names:
    """Ids of rows by their order, and of teams by their name, so that two runs can be compared."""

    def __init__(self, kind: Kind, rows: Sequence[Row], teams: Mapping[int, str]) -> None:
        self._ids = {row["id"]: at for at, row in enumerate(rows)} if kind.key == ("id",) else {}
        self._teams = teams

    @classmethod
    async def read(cls, connection: asyncpg.Connection, kind: Kind, rows: Sequence[Row]) -> "Names":
        teams = await connection.fetch("SELECT id, name FROM team")
        return cls(kind, rows, {team["id"]: team["name"] for team in teams})

    def row(self, values: Row) -> Row:
        named = dict(values)
        if "id" in named and self._ids:
            named["id"] = self._ids[named["id"]]
        if "team_id" in named:
            named["team_id"] = self._teams.get(named["team_id"], named["team_id"])
        return named

    def change(self, change: Change) -> Change:
        key = tuple(self._ids.get(one, one) for one in change.key)
        return Change(change.action, key, self.row(change.before))

    @property
    def teams(self) -> list[str]:
        return sorted(self._teams.values())


async def one_by_one(
    connection: asyncpg.Connection, kind: Kind, rows: Sequence[Row], request: Request
) -> Told:
    async with connection.transaction():
        told = await Reference(connection, kind, request).apply(rows)
    table = await read_table(connection, kind)
    names = await Names.read(connection, kind, table)
    told.table = [names.row(row) for row in table]
    told.changes = [names.change(change) for change in told.changes]
    told.teams = names.teams
    return told


async def in_chunks(
    connection: asyncpg.Connection, bench: Bench, kind: Kind, payload: InsertRows
) -> Told:
    job_id = await bench.run(payload)
    done = await bench.job(job_id)
    assert done.state == "succeeded", done.error
    table = await read_table(connection, kind)
    names = await Names.read(connection, kind, table)
    return Told(
        Counter(await bench.counts(job_id)),
        [(one.row_no, one.code) for one in await bench.verdicts(job_id)],
        [names.change(change) for change in changes_of(await read_audit(connection, job_id))],
        [names.row(row) for row in table],
        names.teams,
    )


# The audit


async def read_audit(connection: asyncpg.Connection, job_id: UUID) -> list[Row]:
    lines = await connection.fetch(
        "SELECT action, table_name, rows, keys, coalesce(before, '{}') || "
        "coalesce(before_sensitive, '{}') AS before FROM bulwark.audit WHERE job_id = $1 "
        "ORDER BY chunk_no, entry_no",
        job_id,
    )
    return [
        {**line, "keys": json.loads(line["keys"]), "before": json.loads(line["before"])}
        for line in lines
    ]


def changes_of(lines: Sequence[Row]) -> list[Change]:
    return [
        Change(line["action"], tuple(line["keys"]["keys"][0]), line["before"])
        for line in lines
        if line["action"] != "insert"
    ]


def undo(kind: Kind, lines: Sequence[Row], table: Sequence[Row]) -> list[Row]:
    """The table as it was before the audited changes, in the order of its keys."""
    rows = {tuple(row[name] for name in kind.key): dict(row) for row in table}
    for line in reversed([one for one in lines if one["table_name"] == kind.table]):
        keys = list(audited_keys(line, rows))
        assert line["rows"] == len(keys)
        for key in keys:
            if line["action"] == "insert":
                del rows[key]
            else:
                _put_back(rows[key], line["before"])
    return [rows[key] for key in sorted(rows)]


def audited_keys(line: Row, rows: Mapping[tuple[Any, ...], Row]) -> list[tuple[Any, ...]]:
    ranges = line["keys"].get("ranges", [])
    inside = [key for key in rows for low, high in ranges if low <= key[0] <= high]
    return inside + [tuple(key) for key in line["keys"].get("keys", [])]


def _put_back(row: Row, before: Row) -> None:
    row.update(before)
    if "version" in row:
        row["version"] -= 1


# Heroes

NOT_THIRTEEN = "ALTER TABLE hero ADD CONSTRAINT ck_hero_not_thirteen CHECK (age <> 13)"
TRIGGER = """
    CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {} RETURN NEW; END $$;
    CREATE TRIGGER meddle BEFORE {} ON hero FOR EACH ROW EXECUTE FUNCTION meddle();
"""
REFUSE = "IF NEW.name = 'Loki' THEN RAISE EXCEPTION 'no Loki here'; END IF;"
LEAVE_OUT = "IF NEW.name = 'Loki' THEN RETURN NULL; END IF;"
TRIGGERS = {
    "refusing": TRIGGER.format(REFUSE, "INSERT"),
    "refusing updates too": TRIGGER.format(REFUSE, "INSERT OR UPDATE"),
    "leaving rows out": TRIGGER.format(LEAVE_OUT, "INSERT"),
}
RESET = """
    TRUNCATE hero, team RESTART IDENTITY CASCADE;
    INSERT INTO team (id, name, deleted_at) OVERRIDING SYSTEM VALUE
        VALUES (1, 'Red', NULL), (2, 'Blue', NULL), (3, 'Gone', now());
    ALTER TABLE team ALTER id RESTART WITH 10;
"""
BEFORE = """
    INSERT INTO hero (name, age, email, external_id, secret_name, team_id, deleted_at, version)
        VALUES ($1, $2, $3, $4, $5, $6, make_timestamptz(2030, 1, $7, 0, 0, 0, 'UTC'), $8)
        ON CONFLICT DO NOTHING
"""
FIELDS = ("name", "age", "email", "external_id", "secret_name", "team_id", "deleted", "version")
EMAILS = ["a@x.org", "b@x.org", "c@x.org"]
IDS = ["A", "B", "C"]

heroes_before = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from(["Old", "Ann"]),
            "age": st.sampled_from([None, 0, 40]),
            "email": st.sampled_from([None, *EMAILS]),
            "external_id": st.sampled_from([None, *IDS]),
            "secret_name": st.sampled_from([None, "Fox"]),
            "team_id": st.sampled_from([None, 1, 2]),
            "deleted": st.sampled_from([None, None, 1, 2, 3]),
            "version": st.integers(1, 2),
        }
    ),
    min_size=2,
    max_size=8,
)
OPTIONAL = {
    "age": st.sampled_from([None, 0, 30, 40, 50, 60, 13, -1]),
    "email": st.sampled_from([None, *EMAILS]),
    "external_id": st.sampled_from([None, *IDS]),
    "secret_name": st.sampled_from([None, "Fox", "Ivy"]),
}
NAME = {"name": st.sampled_from(["Ann", "Bob", "Cid", "Dan", "Eve", "Loki", ""])}
CLUBS = st.sampled_from([None, "Red", "Red", "Blue", "Blue", "Gone", "Nowhere", ""])
TEAM_IDS = st.sampled_from([None, 1, 1, 2, 2, 3, 77])
SEEN = st.sampled_from([None, None, None, 1, 2, 3, "new"])


def hero_rows() -> st.SearchStrategy[list[Row]]:
    """Rows that give all columns, or each some of them; and a team by name, id or not."""
    ways: list[dict[str, st.SearchStrategy[Any]]] = [{}, {"club": CLUBS}, {"team_id": TEAM_IDS}]
    kinds = []
    for way in ways:
        for versions in ({}, {"seen": SEEN}):
            columns = {**OPTIONAL, **way, **versions}
            kinds.append(st.fixed_dictionaries({**NAME, **columns}))
            kinds.append(st.fixed_dictionaries(NAME, optional=columns))
    return st.one_of([st.lists(kind, min_size=8, max_size=20) for kind in kinds])


requests = st.builds(
    Request,
    on_conflict=st.sampled_from(["update", "update", "update", "skip", "reject"]),
    on_deleted=st.sampled_from(["insert", "revive", "reject"]),
    on_missing=st.sampled_from(["reject", "create", "null"]),
    update=st.none() | st.lists(st.sampled_from([*NAME, *OPTIONAL]), unique=True, min_size=1),
)


@pytest.fixture
async def connection(connection: asyncpg.Connection) -> asyncpg.Connection:
    await connection.execute(NOT_THIRTEEN)
    return connection


@pytest.fixture
def bench(bench: Bench, unusual_tables: None) -> Bench:
    bench.models = discover_models([unusual_models.__name__])
    return bench


def payload_for(kind: Kind, rows: list[Row], request: Request, chunk_rows: int) -> InsertRows:
    mentioned = {name for row in rows for name in row}
    update = None
    if request.on_conflict == "update" and request.update is not None:
        update = [name for name in request.update if name in mentioned]
    return InsertRows.model_validate(
        {
            "table": kind.table,
            "rows": rows,
            "map": {"club": "team.name"} if "club" in mentioned else {},
            "expect_version": "seen" if "seen" in mentioned else None,
            "chunk_rows": chunk_rows,
            **request._asdict(),
            "update": update,
        }
    )


async def heroes_there(connection: asyncpg.Connection, before: Sequence[Row]) -> None:
    await connection.execute(RESET)
    await connection.executemany(BEFORE, [[one[name] for name in FIELDS] for one in before])


async def same(
    connection: asyncpg.Connection,
    bench: Bench,
    before: Sequence[Row],
    rows: list[Row],
    request: Request,
    chunk_rows: int,
) -> None:
    if request.on_conflict != "update":
        rows = [{name: row[name] for name in row if name != "seen"} for row in rows]
    await heroes_there(connection, before)
    expected = await one_by_one(connection, HERO, rows, request)
    await heroes_there(connection, before)
    table = await read_table(connection, HERO)
    payload = payload_for(HERO, rows, request, chunk_rows)
    assert await in_chunks(connection, bench, HERO, payload) == expected
    await _undone(connection, HERO, table)


async def _undone(connection: asyncpg.Connection, kind: Kind, before: Sequence[Row]) -> None:
    """Replayed backwards from the table, the audit of the last job gives the table before it."""
    job_id = await connection.fetchval("SELECT id FROM bulwark.job ORDER BY id DESC LIMIT 1")
    lines = await read_audit(connection, job_id)
    assert undo(kind, lines, await read_table(connection, kind)) == before
    if kind is HERO:
        told = sum(line["rows"] for line in lines if line["table_name"] == "team")
        assert told == await connection.fetchval("SELECT count(*) - 3 FROM team")


def examples(number: int) -> settings:
    return settings(
        max_examples=number,
        phases=[Phase.explicit, Phase.reuse, Phase.generate],  # an example is a job
    )


chunk_sizes = st.sampled_from([1, 2, 3, 50, 50, 50])


@examples(60)
@given(before=heroes_before, rows=hero_rows(), request_=requests, chunk_rows=chunk_sizes)
async def test_heroes_are_updated_revived_and_inserted_as_one_by_one(
    connection: asyncpg.Connection,
    bench: Bench,
    before: list[Row],
    rows: list[Row],
    request_: Request,
    chunk_rows: int,
) -> None:
    await same(connection, bench, before, rows, request_, chunk_rows)


@pytest.mark.parametrize("trigger", TRIGGERS.values(), ids=TRIGGERS.keys())
@examples(15)
@given(before=heroes_before, rows=hero_rows(), request_=requests, chunk_rows=chunk_sizes)
async def test_beside_triggers_heroes_are_treated_as_one_by_one(
    connection: asyncpg.Connection,
    bench: Bench,
    trigger: str,
    before: list[Row],
    rows: list[Row],
    request_: Request,
    chunk_rows: int,
) -> None:
    await connection.execute("DROP FUNCTION IF EXISTS meddle CASCADE;" + trigger)
    await same(connection, bench, before, rows, request_, chunk_rows)


# Tables of other kinds

SEATS: st.SearchStrategy[Row] = st.fixed_dictionaries(
    {"hall": st.sampled_from("AB"), "number": st.integers(1, 3)},
    optional={"guest": st.sampled_from([None, "Ann", "Bob", "Cid"])},
)
ACCOUNTS: st.SearchStrategy[Row] = st.fixed_dictionaries(
    {"email": st.sampled_from(["a@x.org", "A@x.org", "b@x.org", "c@x.org"])},
    optional={
        "code": st.sampled_from([None, "1", "2", "3"]),
        "active": st.booleans(),
        "handle": st.sampled_from([None, "h", "i"]),
    },
)
ITEMS: st.SearchStrategy[Row] = st.fixed_dictionaries(
    {"count": st.integers(1, 4), "price": st.integers(1, 4)}
)
UNUSUAL: dict[str, tuple[Kind, st.SearchStrategy[Row], list[str]]] = {
    "a key of two columns": (SEAT, SEATS, ["guest"]),
    "nulls that are equal, and keys that are expressions": (ACCOUNT, ACCOUNTS, ["handle"]),
    "a key that the database computes": (ITEM, ITEMS, ["count"]),
}


@pytest.mark.parametrize("name", UNUSUAL)
@examples(20)
@given(data=st.data(), chunk_rows=chunk_sizes)
async def test_tables_of_every_kind_are_updated_as_one_by_one(
    connection: asyncpg.Connection, bench: Bench, name: str, data: st.DataObject, chunk_rows: int
) -> None:
    kind, row, few = UNUSUAL[name]
    before = data.draw(st.lists(row, max_size=5), "before")
    rows = data.draw(st.lists(row, min_size=6, max_size=15), "rows")
    update = data.draw(st.sampled_from([None, few]), "update")
    if update is not None and not any(update[0] in one for one in rows):
        update = None
    await same_unusual(connection, bench, kind, before, rows, Request(update=update), chunk_rows)


async def same_unusual(
    connection: asyncpg.Connection,
    bench: Bench,
    kind: Kind,
    before: Sequence[Row],
    rows: list[Row],
    request: Request,
    chunk_rows: int,
) -> None:
    empty = f"TRUNCATE {kind.table} RESTART IDENTITY CASCADE"
    await connection.execute(empty)
    await one_by_one(connection, kind, before, Request("skip"))
    expected = await one_by_one(connection, kind, rows, request)
    await connection.execute(empty)
    await one_by_one(connection, kind, before, Request("skip"))
    table = await read_table(connection, kind)
    payload = payload_for(kind, rows, request, chunk_rows)
    assert await in_chunks(connection, bench, kind, payload) == expected
    await _undone(connection, kind, table)


# What random rows seldom meet

ANY_CHUNK = pytest.mark.parametrize("chunk_rows", [1, 50])
OF_A_AND_B = [
    {**dict.fromkeys(FIELDS), "name": "Old", "external_id": x, "version": 1} for x in "AB"
]


@ANY_CHUNK
async def test_a_column_that_is_not_overwritten_gets_no_row_rejected(
    connection: asyncpg.Connection, bench: Bench, chunk_rows: int
) -> None:
    rows: list[Row] = [
        {"name": "Ann", "external_id": "A", "age": 31, "team_id": 77},
        {"name": "Bob", "external_id": "B", "age": 13, "team_id": None},
    ]
    await same(connection, bench, OF_A_AND_B, rows, Request(update=["age"]), chunk_rows)


@ANY_CHUNK
async def test_a_team_stays_created_when_its_hero_leaves_it_in_the_same_import(
    connection: asyncpg.Connection, bench: Bench, chunk_rows: int
) -> None:
    rows: list[Row] = [
        {"name": "Ann", "external_id": "A", "club": "New"},
        {"name": "Ann", "external_id": "A", "club": None},
    ]
    await same(connection, bench, [], rows, Request(on_missing="create"), chunk_rows)


@ANY_CHUNK
async def test_a_key_that_only_the_update_makes_is_met_by_the_next_row(
    connection: asyncpg.Connection, bench: Bench, chunk_rows: int
) -> None:
    rows: list[Row] = [{"count": 2, "price": 6}, {"count": 1, "price": 8}]
    before = [{"count": 3, "price": 4}]
    request = Request(update=["count"])
    await same_unusual(connection, bench, ITEM, before, rows, request, chunk_rows)


@ANY_CHUNK
async def test_a_row_updated_out_of_an_index_does_not_take_part_in_it(
    connection: asyncpg.Connection, bench: Bench, chunk_rows: int
) -> None:
    before: list[Row] = [{"email": "a@x.org", "code": "1", "handle": "i"}]
    rows: list[Row] = [
        {"email": "b@x.org", "code": "2", "handle": "h", "active": True},
        {"email": "a@x.org", "code": "1", "handle": "h", "active": False},
    ]
    request = Request(update=["handle"])
    await same_unusual(connection, bench, ACCOUNT, before, rows, request, chunk_rows)


@pytest.mark.parametrize("on_conflict", ["reject", "skip", "update"])
async def test_a_sequence_that_lags_behind_its_table_gets_rows_refused_and_no_job_stuck(
    on_conflict: str, connection: asyncpg.Connection, bench: Bench
) -> None:
    await connection.execute(
        "INSERT INTO hero (id, name) SELECT n, 'Old' FROM generate_series(1, 100) AS n"
    )
    rows = [{"name": "Ann", "external_id": "A"}]
    told = await in_chunks(
        connection, bench, HERO, payload_for(HERO, rows, Request(on_conflict), 50)
    )
    skips = on_conflict == "skip"
    assert told.counts == {"skipped" if skips else "rejected": 1}
    assert told.refused == ([] if skips else [(1, "unique_violation")])


async def test_a_clash_with_a_row_committed_meanwhile_is_judged_anew(
    connection: asyncpg.Connection, bench: Bench, database_url: str
) -> None:
    await heroes_there(connection, OF_A_AND_B)
    rows: list[Row] = [
        {"name": "Ann", "external_id": "A", "email": None},
        {"name": "Bob", "external_id": "B", "email": "b@x.org"},
    ]
    async with connected(database_url) as other:
        writing = other.transaction()
        await writing.start()
        await other.execute("INSERT INTO hero (name, email) VALUES ('Eve', 'b@x.org')")
        payload = payload_for(HERO, rows, Request(), 1)
        importing = asyncio.create_task(in_chunks(connection, bench, HERO, payload))
        await until(
            lambda: waiting_for_a_lock(bench.sessions), "the import waits for the other transaction"
        )
        await writing.commit()
        told = await importing
    assert told.refused == [(2, "ambiguous_match")]


async def test_what_a_trigger_changes_beside_is_in_the_audit(
    connection: asyncpg.Connection, bench: Bench
) -> None:
    await heroes_there(connection, OF_A_AND_B)
    await connection.execute(TRIGGER.format("NEW.age := 99;", "UPDATE"))
    table = await read_table(connection, HERO)
    await in_chunks(
        connection,
        bench,
        HERO,
        payload_for(HERO, [{"name": "Ann", "external_id": "A"}], Request(), 1),
    )
    await _undone(connection, HERO, table)
