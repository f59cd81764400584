"""Purging: what goes, what is kept and why, and that a dry run says so beforehand."""

import random
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jobs.purge_deleted_rows import PurgeDeletedRows
from tests.inprocess import Bench

ALL = {"team": 30, "hero": 30, "membership": 30, "transfer": 30}
OLD, RECENT = timedelta(days=31), timedelta(days=29)


class Club:
    """Rows of the domain, each alive or deleted some time ago."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def team(self, name: str, deleted: timedelta | None = None) -> int:
        return await self._id(
            "INSERT INTO team (name, deleted_at) VALUES ($1, now() - $2::interval) RETURNING id",
            *(name, deleted),
        )

    async def hero(self, team: int | None = None, deleted: timedelta | None = None) -> int:
        return await self._id(
            "INSERT INTO hero (name, team_id, deleted_at) VALUES ('Ann', $1, now() - $2::interval)"
            " RETURNING id",
            *(team, deleted),
        )

    async def role(self, hero: int, team: int, deleted: timedelta | None = None) -> int:
        return await self._id(
            "INSERT INTO membership (hero_id, team_id, role, deleted_at)"
            " VALUES ($1, $2, 'goalkeeper', now() - $3::interval) RETURNING id",
            *(hero, team, deleted),
        )

    async def ids(self, table: str) -> set[int]:
        return {row["id"] for row in await self._connection.fetch(f"SELECT id FROM {table}")}

    async def _id(self, sql: str, *given: object) -> int:
        number: int = await self._connection.fetchval(sql, *given)
        return number


@pytest.fixture
def club(connection: asyncpg.Connection) -> Club:
    return Club(connection)


async def purge(bench: Bench, **request: Any) -> tuple[UUID, dict[str, Any]]:
    """Run a purge to its end, and give its outcome."""
    job_id = await bench.run(PurgeDeletedRows(**{"retention_days": ALL, **request}))
    row = await bench.job(job_id)
    assert row.state == "succeeded", row.error
    outcome: Any = row.outcome
    return job_id, outcome


async def test_rows_past_their_retention_go_and_all_others_stay(bench: Bench, club: Club) -> None:
    alive, recent, old = (
        await club.hero(),
        await club.hero(None, RECENT),
        await club.hero(None, OLD),
    )

    job_id, outcome = await purge(bench)

    assert await club.ids("hero") == {alive, recent}
    assert outcome["verdicts"] == {"purged": 1}
    assert outcome["tables"]["hero"] == {"purged": 1, "kept": 0, "pieces": 0}
    [line] = await bench.audit(job_id)
    assert (line["action"], line["table_name"], line["rows"]) == ("purge", "hero", 1)
    assert line["keys"] == {"keys": [[old]]}


async def test_what_refers_to_a_row_goes_before_it(bench: Bench, club: Club) -> None:
    team = await club.team("Red", OLD)
    hero = await club.hero(team, OLD)
    await club.role(hero, team, OLD)

    _, foreseen = await purge(bench, dry_run=True)
    _, outcome = await purge(bench)

    assert outcome["verdicts"] == foreseen["verdicts"] == {"purged": 3}
    assert [await club.ids(name) for name in ALL] == [set()] * 4


async def test_a_row_that_something_still_refers_to_is_kept_and_told(
    bench: Bench, club: Club
) -> None:
    team = await club.team("Red", OLD)
    hero = await club.hero(team, OLD)
    role = await club.role(hero, team, RECENT)
    free = await club.hero(None, OLD)

    job_id, outcome = await purge(bench)

    assert await club.ids("hero") == {hero}
    assert free not in await club.ids("hero")
    assert outcome["verdicts"] == {"purged": 1, "kept": 2}
    told = {(one.code, one.message) for one in await bench.verdicts(job_id)}
    assert told == {
        (
            "still_referenced",
            f"hero {hero} is still referred to by membership.hero_id of {role}",
        ),
        ("still_referenced", f"team {team} is still referred to by hero.team_id of {hero}"),
    }


# What a dry run says


AGES = (None, RECENT, OLD, OLD, OLD, OLD, OLD, OLD)


def club_of(chance: random.Random) -> dict[str, Any]:
    """Teams, heroes with a home or none, roles and transfers; most were deleted long ago."""

    def age() -> timedelta | None:
        return chance.choice(AGES)

    teams, heroes = chance.randint(1, 4), chance.randint(1, 9)
    return {
        "teams": [age() for _ in range(teams)],
        "heroes": [(chance.randint(0, 5), age()) for _ in range(heroes)],
        "roles": [
            (chance.randrange(heroes), chance.randrange(teams), age())
            for _ in range(chance.randint(0, 9))
        ],
        "transfers": [
            (chance.randrange(heroes), chance.randrange(teams), age())
            for _ in range(chance.randint(0, 5))
        ],
    }


Rows = dict[str, list[dict[str, Any]]]


async def settle(connection: asyncpg.Connection, drawn: dict[str, Any]) -> None:
    """Put a club that was drawn into the empty tables."""
    await connection.execute("TRUNCATE team, hero, membership, transfer RESTART IDENTITY")
    teams = len(drawn["teams"])
    for number, age in enumerate(drawn["teams"]):
        await insert(connection, "team", age, id=number, name=f"Team {number}")
    for number, (team, age) in enumerate(drawn["heroes"]):
        home = team if team < teams else None
        await insert(connection, "hero", age, id=number, name="Ann", team_id=home)
    for number, (hero, team, age) in enumerate(drawn["roles"]):
        of = {"hero_id": hero, "team_id": team}
        await insert(connection, "membership", age, id=number, role=f"{number}", **of)
    for number, (hero, team, age) in enumerate(drawn["transfers"]):
        of = {"hero_id": hero, "to_team_id": team}
        await insert(connection, "transfer", age, id=number, **of)


async def insert(
    connection: asyncpg.Connection, table: str, age: timedelta | None, **values: object
) -> None:
    names = [*values, "deleted_at"]
    places = [f"${number}" for number in range(1, len(names))] + [
        f"now() - ${len(names)}::interval"
    ]
    sql = f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join(places)})"
    await connection.execute(sql, *values.values(), age)


async def content(connection: asyncpg.Connection) -> Rows:
    return {
        name: [dict(row) for row in await connection.fetch(f"SELECT * FROM {name} ORDER BY id")]
        for name in ALL
    }


REFERS = (
    ("hero", "team_id", "team"),
    ("membership", "hero_id", "hero"),
    ("membership", "team_id", "team"),
    ("transfer", "hero_id", "hero"),
    ("transfer", "from_team_id", "team"),
    ("transfer", "to_team_id", "team"),
)


def removable(rows: Rows, days: dict[str, int]) -> dict[str, set[int]]:
    """The rows that can go, found one after the other in plain Python."""
    now = datetime.now(UTC)
    due = {
        (name, row["id"])
        for name, kept in days.items()
        for row in rows[name]
        if row["deleted_at"] is not None and row["deleted_at"] < now - timedelta(days=kept)
    }
    links = {
        ((child, row["id"]), (parent, row[column]))
        for child, column, parent in REFERS
        for row in rows[child]
    }
    gone: set[tuple[str, int]] = set()
    while free := {
        row for row in due - gone if all(child in gone for child, to in links if to == row)
    }:
        gone |= free
    return {name: {key for table, key in gone if table == name} for name in ALL}


@settings(
    max_examples=25,
    phases=[Phase.explicit, Phase.generate],
)
@given(
    chance=st.randoms(use_true_random=False, note_method_calls=False),
    purged=st.just(set(ALL)) | st.sets(st.sampled_from(sorted(ALL)), min_size=2),
    cap=st.none() | st.none() | st.integers(1, 6),
    batch_rows=st.integers(1, 5),
)
async def test_a_dry_run_counts_exactly_what_a_run_removes_and_changes_nothing(
    bench: Bench,
    connection: asyncpg.Connection,
    chance: random.Random,
    purged: set[str],
    cap: int | None,
    batch_rows: int,
) -> None:
    await settle(connection, club_of(chance))
    before = await content(connection)
    days = dict.fromkeys(sorted(purged), 30)
    request = {"retention_days": days, "max_rows": cap, "batch_rows": batch_rows}

    _, foreseen = await purge(bench, **request, dry_run=True)
    assert await content(connection) == before
    job_id, done = await purge(bench, **request)

    after = await content(connection)
    removed = {name: ids_of(before, name) - ids_of(after, name) for name in ALL}
    expected = removable(before, days)
    assert {name: len(removed[name]) for name in days} == {
        name: table["purged"] for name, table in foreseen["tables"].items()
    }
    assert all(removed[name] <= expected[name] for name in ALL)
    if not done["capped"]:
        assert removed == expected
    assert (done["verdicts"], done["capped"]) == (foreseen["verdicts"], foreseen["capped"])
    assert sum(map(len, removed.values())) <= (cap or 99)
    assert (await bench.tally(job_id)).rows == sum(done["verdicts"].values())
    kept = {one.message.split(" is ")[0] for one in await bench.verdicts(job_id)}
    assert done["capped"] or len(kept) == done["verdicts"].get("kept", 0)


def ids_of(rows: Rows, table: str) -> set[int]:
    return {row["id"] for row in rows[table]}
