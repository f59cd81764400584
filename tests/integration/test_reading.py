"""Reading rows: pages, one row with what belongs to it, a team, a hero's history."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from uuid6 import uuid7

from db.errors import BadKey, ModelError
from db.ledger.audit import Entry, Keys, write_entries
from db.ledger.job import Claim
from db.ledger.row_history import read_row_history
from db.live_rows import INCLUDE_DELETED
from db.reading.heroes import hero_history
from db.reading.keys import from_cursor, parse_key, to_cursor
from db.reading.pages import Page, page
from db.reading.rows import RowView, read_row
from db.reading.teams import team_with_heroes
from db.registry import discover_models
from jobs.insert_rows import InsertRows
from tests import unusual_models
from tests.command_line import Cli, make_cli, sentence
from tests.inprocess import Bench
from tests.stage import connected

Sessions = async_sessionmaker[AsyncSession]
Rows = list[dict[str, Any]]
Reading = Callable[[AsyncSession], Awaitable[Any]]

MODELS = discover_models()
UNUSUAL = discover_models(["tests.unusual_models"])
HERO, TEAM = MODELS["hero"], MODELS["team"]
CANARY = "Diana-Prince"

TOWN = f"""
    INSERT INTO team (id, name) VALUES (1, 'Red'), (2, 'Blue');
    INSERT INTO hero (id, name, team_id, secret_name) VALUES (1, 'Ann', 1, '{CANARY}');
"""
MORE = f"""
    INSERT INTO hero (id, name, team_id, secret_name)
         SELECT 1 + n, 'Hero ' || n, 1, '{CANARY}' FROM generate_series(1, %(n)s) AS n;
    INSERT INTO transfer (id, hero_id, from_team_id, to_team_id, transferred_at)
         SELECT n, 1, 1 + n %% 2, 2 - n %% 2, '2026-01-01'::timestamptz + n * interval '1 day'
           FROM generate_series(1, %(n)s) AS n;
    INSERT INTO membership (id, hero_id, team_id, role)
         SELECT n, 1, 1 + n %% 2, 'role ' || n FROM generate_series(1, %(n)s) AS n;
"""


async def write(sessions: Sessions, *script: str) -> None:
    """Execute statements that end with a semicolon each."""
    async with sessions.begin() as session:
        for statement in "".join(script).split(";")[:-1]:
            await session.execute(sa.text(statement))


@contextmanager
def counted(engine: AsyncEngine) -> Iterator[list[str]]:
    """The statements that go to the server meanwhile."""
    statements: list[str] = []

    def note(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    yield statements
    event.remove(engine.sync_engine, "before_cursor_execute", note)


def held() -> Claim:
    return Claim(uuid7(), uuid4(), uuid4(), "test", {}, 0, 1, 60, "Zoë", None, 0, 0.0)


READINGS: dict[str, tuple[Reading, int]] = {
    "a team with its heroes": (lambda s: team_with_heroes(s, 1), 2),
    "a hero's history": (lambda s: hero_history(s, 1), 5),
    "a team's row": (lambda s: read_row(s, MODELS, TEAM, (1,), most=100), 7),
    "a hero's row": (lambda s: read_row(s, MODELS, HERO, (1,), most=100), 5),
    "a transfer's row": (lambda s: read_row(s, MODELS, MODELS["transfer"], (1,)), 3),
    "a page": (lambda s: page(s, HERO, limit=100), 1),
}


async def read_all(sessions: Sessions, engine: AsyncEngine) -> dict[str, tuple[str, list[str]]]:
    """What each reading gives, and by which statements."""
    found = {}
    for name, (reading, _) in READINGS.items():
        async with sessions() as session:
            with counted(engine) as statements:
                found[name] = repr(await reading(session)), statements
    return found


@pytest.mark.parametrize("rows", [1, 50])
async def test_the_number_of_statements_does_not_grow_with_the_rows(
    sessions: Sessions, engine: AsyncEngine, rows: int
) -> None:
    await write(sessions, TOWN, MORE % {"n": rows})
    found = await read_all(sessions, engine)
    numbers = {name: len(statements) for name, (_, statements) in found.items()}
    assert numbers == {name: expected for name, (_, expected) in READINGS.items()}
    growing = [shown for name, (shown, _) in found.items() if name != "a transfer's row"]
    assert all(shown.count("version=") > rows for shown in growing)


async def test_a_secret_is_not_even_read(sessions: Sessions, engine: AsyncEngine) -> None:
    await write(sessions, TOWN, MORE % {"n": 3})
    for shown, statements in (await read_all(sessions, engine)).values():
        assert "Ann" in shown
        assert CANARY not in shown
        assert not any("secret_name" in one for one in statements)


# A team and a hero


async def test_a_team_comes_with_its_live_heroes_by_name(sessions: Sessions) -> None:
    await write(
        sessions,
        TOWN,
        "INSERT INTO hero (id, name, team_id, deleted_at) VALUES (2, 'Zed', 1, NULL),"
        " (3, 'Al', 1, NULL), (4, 'Bo', 1, now()), (5, 'Cy', 2, NULL);",
    )
    async with sessions() as session:
        team = await team_with_heroes(session, 1)
        assert team is not None
        assert (team.name, [one.name for one in team.heroes]) == ("Red", ["Al", "Ann", "Zed"])
    async with sessions(execution_options=INCLUDE_DELETED) as session:
        team = await team_with_heroes(session, 1)
        assert team is not None
        assert [one.name for one in team.heroes] == ["Al", "Ann", "Bo", "Zed"]


async def test_a_history_has_transfers_newest_first_and_names_of_live_teams(
    sessions: Sessions,
) -> None:
    await write(
        sessions,
        TOWN,
        "INSERT INTO team (id, name, deleted_at) VALUES (3, 'Gone', now());",
        "INSERT INTO transfer (id, hero_id, from_team_id, to_team_id, transferred_at) VALUES"
        " (1, 1, NULL, 2, '2026-03-01Z'), (2, 1, 3, 1, '2026-03-01Z'),"
        " (3, 1, 2, 3, '2026-02-01Z');",
        "INSERT INTO membership (id, hero_id, team_id, role, deleted_at) VALUES"
        " (1, 1, 2, 'scout', NULL), (2, 1, 3, 'coach', NULL), (3, 1, 1, 'old', now());",
    )
    async with sessions() as session:
        hero = await hero_history(session, 1)
    assert hero is not None
    assert hero.team is not None
    assert (hero.name, hero.team.name) == ("Ann", "Red")
    assert [(one.id, one.from_team_name, one.to_team_name) for one in hero.transfers] == [
        (2, None, "Red"),
        (1, None, "Blue"),
        (3, "Blue", None),
    ]
    assert [(one.role, one.team_name) for one in hero.roles] == [("coach", None), ("scout", "Blue")]


async def test_what_is_deleted_or_never_was_has_no_history(sessions: Sessions) -> None:
    await write(
        sessions, TOWN, "UPDATE hero SET deleted_at = now(); UPDATE team SET deleted_at = now();"
    )
    async with sessions() as session:
        for key in (1, 9):
            assert await hero_history(session, key) is None
            assert await team_with_heroes(session, key) is None
            assert await read_row(session, MODELS, HERO, (key,)) is None


async def test_a_history_tells_what_jobs_did_to_the_hero(bench: Bench) -> None:
    came: Rows = [{"external_id": "a", "name": "Ann", "secret_name": CANARY}, {"name": "Bob"}]
    await bench.run(InsertRows(table="hero", rows=came))
    changed: Rows = [{"external_id": "a", "name": "Anna", "secret_name": "other"}]
    job_id = await bench.run(InsertRows(table="hero", rows=changed, on_conflict="update"))
    async with bench.sessions() as session:
        ann, bob = [await hero_history(session, key) for key in (1, 2)]
    assert ann is not None
    assert bob is not None
    assert [one["action"] for one in ann.audit.lines] == ["update", "insert"]
    newest = ann.audit.lines[0]
    assert (newest["job_id"], newest["before"], newest["version"]) == (job_id, {"name": "Ann"}, 1)
    assert [one["action"] for one in bob.audit.lines] == ["insert"]
    assert ann.audit.complete
    assert CANARY not in ann.model_dump_json()


# What the audit tells of one row


async def entry(session: AsyncSession, table: str, keys: Keys, rows: int) -> UUID:
    claim = held()
    await write_entries(session, claim, 1, [Entry("insert", table, rows, keys)])
    return claim.job_id


async def jobs_about(session: AsyncSession, model: str, *key: Any) -> set[UUID]:
    history = await read_row_history(session, UNUSUAL[model].table, key)
    return {one["job_id"] for one in history.lines}


async def test_lines_are_found_by_key_by_range_and_among_the_keys_of_a_chunk(
    sessions: Sessions,
) -> None:
    badge, other = uuid4(), uuid4()
    async with sessions() as session:
        ranges = await entry(session, "hero", Keys(ranges=[(1, 5), (8, 9)]), 7)
        alone = await entry(session, "hero", Keys(keys=[(8,)]), 1)
        one_range = await entry(session, "team", Keys(ranges=[(8, 8)]), 1)
        seats = await entry(session, "seat", Keys(keys=[("A", 1), ("B", 2)]), 2)
        badges = await entry(session, "badge", Keys(keys=[(badge,), (uuid4(),)]), 2)

        assert await jobs_about(session, "hero", 5) == {ranges}
        assert await jobs_about(session, "hero", 6) == set()
        assert await jobs_about(session, "hero", 8) == {ranges, alone}
        assert await jobs_about(session, "team", 8) == {one_range}
        assert await jobs_about(session, "seat", "A", 1) == {seats}
        assert await jobs_about(session, "seat", "A", 2) == set()
        assert await jobs_about(session, "badge", badge) == {badges}
        assert await jobs_about(session, "badge", other) == set()


async def test_a_key_of_several_columns_is_told_from_one_of_the_same_values(
    sessions: Sessions,
) -> None:
    columns = [sa.Column(name, sa.Integer, primary_key=True) for name in ("x", "y")]
    point = sa.Table("point", sa.MetaData(), *columns)
    async with sessions() as session:
        await entry(session, "point", Keys(keys=[(1, 2), (3, 4)]), 2)
        found = {
            key: len((await read_row_history(session, point, key)).lines)
            for key in ((1, 2), (3, 4), (2, 1), (1, 1), (1, 4))
        }
    assert found == {(1, 2): 1, (3, 4): 1, (2, 1): 0, (1, 1): 0, (1, 4): 0}


async def test_a_history_that_was_cut_says_so(sessions: Sessions) -> None:
    async with sessions() as session:
        for _ in range(3):
            await entry(session, "hero", Keys(keys=[(1,)]), 1)
        await entry(session, "team", Keys(keys=[(1,)]), 1)

        async def history(**bounds: int) -> tuple[int, bool]:
            found = await read_row_history(session, HERO.table, (1,), **bounds)
            return len(found.lines), found.complete

        assert await history() == (3, True)
        assert await history(most=3) == (3, True)
        assert await history(most=2) == (2, False)
        assert await history(searched_lines=4) == (3, True)
        found, complete = await history(searched_lines=1)
        assert found < 3
        assert not complete


# One row of any model


async def view(session: AsyncSession, model: str, *key: Any, **terms: Any) -> RowView:
    found = await read_row(session, UNUSUAL, UNUSUAL[model], key, **terms)
    assert found is not None
    return found


async def test_a_row_comes_with_what_its_relationships_lead_to(sessions: Sessions) -> None:
    await write(sessions, TOWN, MORE % {"n": 3})
    async with sessions() as session:
        team = await view(session, "team", 1, most=2)
    assert set(team.children) == {"heroes", "memberships", "arrivals", "departures"}
    heroes = team.children["heroes"]
    assert [one.row.id for one in heroes.rows] == [4, 3]  # type: ignore[attr-defined]  # of any class
    assert heroes.more
    arrivals = team.children["arrivals"]
    assert not arrivals.more
    assert all(one.parents["hero"].name == "Ann" for one in arrivals.rows)  # type: ignore[union-attr]  # it has one


async def test_deleted_rows_come_to_who_asks_and_tell_when(sessions: Sessions) -> None:
    await write(sessions, TOWN, "UPDATE hero SET deleted_at = '2026-05-01Z';")
    async with sessions() as session:
        assert (await view(session, "team", 1)).children["heroes"].rows == ()
        assert (await page(session, HERO)).rows == ()
    async with sessions() as session:
        (hero,) = (await view(session, "team", 1, deleted=True)).children["heroes"].rows
        (listed,) = (await page(session, HERO, deleted=True)).rows
    for row in (hero.row, listed):
        assert isinstance(row, HERO.public)
        assert row.model_dump()["deleted_at"] == datetime(2026, 5, 1, tzinfo=UTC)


@pytest.mark.usefixtures("unusual_tables")
async def test_rows_of_any_key_and_type_are_read(sessions: Sessions) -> None:
    await write(
        sessions,
        "INSERT INTO seat (hall, number, guest) VALUES ('A', 1, 'Ann'), ('A', 2, 'Bob');",
        "INSERT INTO gadget (spec, colour, tags, price) VALUES ('{}', 'RED', '{a}', 1.50);",
    )
    async with sessions() as session:
        seat = await view(session, "seat", "A", 2)
        gadgets = await page(session, UNUSUAL["gadget"])
    assert seat.itself.row.model_dump() == {"hall": "A", "number": 2, "guest": "Bob"}
    (gadget,) = gadgets.rows
    assert gadget.model_dump(exclude_none=True) == {
        "spec": {},
        "colour": unusual_models.Colour.RED,
        "tags": ["a"],
        "price": Decimal("1.50"),
    }


async def test_a_row_that_its_public_class_refuses_is_named_without_its_value(
    sessions: Sessions,
) -> None:
    await write(sessions, "INSERT INTO team (id, name) VALUES (7, ' ');")
    async with sessions() as session:
        with pytest.raises(ModelError, match=r"The row 7 does not fit TeamPublic: team\.name: "):
            await page(session, TEAM)


# Pages

steps = st.lists(
    st.tuples(
        st.integers(1, 5),  # the size of the page
        st.sets(st.integers(0, 19), max_size=4),  # what is inserted, or restored, behind it
        st.sets(st.integers(0, 19), max_size=4),  # what is deleted
    ),
    min_size=20,
    max_size=20,
)
HALLS = ("a", "B", "ä", "")
KEYS = "unnest(CAST(:keys AS int[])) AS n"
INSERT_TEAMS = f"""
    INSERT INTO team (id, name) SELECT n * 3 - 30, 'team ' || n FROM {KEYS}
    ON CONFLICT (id) DO UPDATE SET deleted_at = NULL
"""
DELETE_TEAMS = f"UPDATE team SET deleted_at = now() FROM {KEYS} WHERE id = n * 3 - 30"
INSERT_SEATS = f"""
    INSERT INTO seat (hall, number) SELECT (ARRAY['a', 'B', 'ä', ''])[1 + n % 4], n / 4 FROM {KEYS}
    ON CONFLICT DO NOTHING
"""
DELETE_SEATS = f"""
    DELETE FROM seat USING {KEYS}
     WHERE hall = (ARRAY['a', 'B', 'ä', ''])[1 + n % 4] AND number = n / 4
"""


def number_of(row: BaseModel) -> int:
    values = row.model_dump()
    if "id" in values:
        return (int(values["id"]) + 30) // 3
    return int(values["number"]) * 4 + HALLS.index(values["hall"])


@pytest.mark.usefixtures("unusual_tables")
@pytest.mark.parametrize(
    ("model", "insert", "delete"),
    [("team", INSERT_TEAMS, DELETE_TEAMS), ("seat", INSERT_SEATS, DELETE_SEATS)],
    ids=["soft", "hard"],
)
@settings(
    max_examples=40,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # an example is many statements
)
@given(first=st.sets(st.integers(0, 19)), steps=steps)
async def test_pages_give_each_row_once_while_others_come_and_go(
    sessions: Sessions, model: str, insert: str, delete: str, first: set[int], steps: Any
) -> None:
    async with sessions() as session:  # what it writes is rolled back

        async def change(statement: str, keys: set[int]) -> None:
            await session.execute(sa.text(statement), {"keys": sorted(keys)})

        await change(insert, first)
        present, always, after, seen = set(first), set(first), None, list[int]()
        for limit, inserted, deleted in steps:
            found = await page(session, UNUSUAL[model], after=after, limit=limit)
            shown = [number_of(one) for one in found.rows]
            assert set(shown) <= present
            assert len(shown) == limit or found.next is None
            seen += shown
            if (after := found.next) is None:
                break
            await change(insert, inserted)
            await change(delete, deleted)
            present = (present | inserted) - deleted
            always &= present
        assert after is None
        assert len(set(seen)) == len(seen)
        assert always <= set(seen)


async def test_the_last_page_has_no_cursor_even_if_it_is_full(sessions: Sessions) -> None:
    await write(sessions, TOWN)
    async with sessions() as session:
        assert (await page(session, TEAM, limit=2)).next is None
        assert (await page(session, TEAM, limit=1)).next is not None
        assert await page(session, MODELS["transfer"]) == Page((), None)


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("hero", (7,)),
        ("hero", (-(2**63),)),
        ("seat", ("A/ü\n", 3)),
        ("badge", (uuid4(),)),
        ("country", ("",)),
    ],
)
def test_a_cursor_leads_back_to_its_key(model: str, key: tuple[Any, ...]) -> None:
    cursor = to_cursor(UNUSUAL[model], key)
    assert cursor.isascii()
    assert from_cursor(UNUSUAL[model], cursor) == key


@pytest.mark.parametrize("cursor", ["", "7", "é", "eyJ", to_cursor(TEAM, (7,)), "=" * 9])
def test_what_is_no_cursor_of_the_model_is_refused(cursor: str) -> None:
    with pytest.raises(BadKey, match="is no cursor of hero"):
        from_cursor(HERO, cursor)


@pytest.mark.parametrize(
    ("model", "words", "told"),
    [
        ("hero", ["x"], "'x' is no key of hero: id: "),
        ("hero", [str(2**63)], "less than or equal to 9223372036854775807"),
        ("hero", ["1", "2"], "A hero is named by one value: give id."),
        ("seat", ["A"], "A seat is named by 2 values: give hall number."),
        ("badge", ["7"], "is no key of badge"),
    ],
)
def test_words_that_are_no_key_are_refused(model: str, words: list[str], told: str) -> None:
    with pytest.raises(BadKey) as refusal:
        parse_key(UNUSUAL[model], words)
    assert told in str(refusal.value)


def test_a_key_is_read_from_words() -> None:
    assert parse_key(UNUSUAL["seat"], ["A", "7"]) == ("A", 7)


# The commands


@pytest.fixture
def cli(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    asyncio.run(execute(database_url, TOWN + MORE % {"n": 2}))
    return make_cli(database_url, None)


async def execute(database_url: str, script: str) -> None:
    async with connected(database_url) as connection:
        await connection.execute(script)


def test_a_list_leads_from_page_to_page_to_its_end(cli: Cli) -> None:
    words = ("list", "Hero", "--limit", "2", "--json")
    first = json.loads(cli(*words).stdout)
    second = json.loads(cli(*words, "--after", first["next"]).stdout)

    assert list(first) == ["rows", "next"]
    assert [[one["id"] for one in document["rows"]] for document in (first, second)] == [
        [1, 2],
        [3],
    ]
    assert second["next"] is None


def test_a_list_for_people_says_how_to_go_on(cli: Cli) -> None:
    shown = cli("list", "hero", "--limit", "2").stdout
    assert [line.split()[:2] for line in shown.splitlines()[:2]] == [["name", "age"], ["Ann", "1"]]
    command = shown.splitlines()[-1].partition("bulwark ")[2].split()
    rest = cli(*command).stdout
    assert "Hero 2" in rest
    assert "bulwark list" not in rest
    assert (
        "no such rows"
        in cli("list", "transfer", "--after", to_cursor(MODELS["transfer"], (9,))).stdout
    )


def test_a_row_is_shown_with_what_belongs_to_it(cli: Cli) -> None:
    document = json.loads(cli("show", "hero", "1", "--json").stdout)
    assert list(document) == ["model", "row", "related", "audit"]
    assert (document["row"]["name"], document["row"]["team"]["name"]) == ("Ann", "Red")
    transfers = document["related"]["transfers"]
    assert [one["from_team"]["name"] for one in transfers["rows"]] == ["Red", "Blue"]
    assert transfers["more"] is False
    assert document["audit"] == {"lines": [], "complete": True}
    shown = cli("show", "hero", "1").stdout
    assert all(word in shown for word in ("hero 1", "Red", "transfers", "memberships", "role 2"))
    assert "there are more" in cli("show", "hero", "1", "--limit", "1").stdout


def test_deleted_rows_are_shown_to_who_asks(cli: Cli, database_url: str) -> None:
    asyncio.run(execute(database_url, "UPDATE hero SET deleted_at = '2026-05-01Z' WHERE id = 1"))
    result = cli("show", "hero", "1")
    assert result.exit_code == 2
    assert sentence(result) == "There is no hero 1; --deleted shows it if it is deleted."
    assert "2026-05-01 00:00:00" in cli("show", "hero", "1", "--deleted").stdout
    assert "Ann" not in cli("list", "hero").stdout
    assert "2026-05-01 00:00:00" in cli("list", "hero", "--deleted").stdout
    assert "Ann" not in cli("show", "team", "1").stdout
    assert "Ann" in cli("show", "team", "1", "--deleted").stdout


def test_no_command_shows_a_secret(cli: Cli) -> None:
    for words in (["list", "hero"], ["show", "hero", "1"], ["show", "team", "1"]):
        for more in ([], ["--json"], ["--deleted"], ["--deleted", "--json"]):
            result = cli(*words, *more)
            assert result.exit_code == 0
            assert "Ann" in result.stdout
            assert CANARY not in result.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("list", "hreo"), "did you mean hero?"),
        (("list", "hero", "--after", "x"), "'x' is no cursor of hero; give the one"),
        (("show", "hero", "Ann"), "'Ann' is no key of hero: id: "),
        (("show", "hero", "99"), "There is no hero 99"),
        (("list", "hero", "--limit", "0"), "--limit"),
    ],
)
def test_what_cannot_be_shown_is_told_in_one_sentence(
    cli: Cli, words: tuple[str, ...], told: str
) -> None:
    result = cli(*words)
    assert result.exit_code == 2
    assert told in sentence(result)
