"""The program's sessions read no deleted rows through the ORM, unless they are asked to."""

import asyncio
import pickle
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlmodel import Field, col

from db.columns import Identified, SoftDeletable
from db.engine import PoolProfile, create_engine, make_sessions
from db.live_rows import INCLUDE_DELETED
from db.models.hero import Hero
from db.models.membership import Membership
from db.models.team import Team
from tests import unusual_models
from worker.testing.databases import Databases

Sessions = async_sessionmaker[AsyncSession]
DELETED = datetime(2026, 1, 1, tzinfo=UTC)
HERO = Hero.__table__  # type: ignore[attr-defined]  # SQLAlchemy adds it
Alias = orm.aliased(Hero)
Inner = orm.aliased(Hero)


async def settle(url: str) -> None:
    """Live and deleted heroes in a live and in a deleted team."""
    async with opened(url) as sessions, sessions.begin() as session:
        session.add_all([Team(id=1, name="live"), Team(id=2, name="dead", deleted_at=DELETED)])
        await session.flush()
        session.add_all(
            [
                Hero(id=1, name="Ann", team_id=1),
                Hero(id=2, name="Bob", team_id=1, deleted_at=DELETED),
                Hero(id=3, name="Cid", team_id=2),
            ]
        )
        await session.flush()
        session.add(Membership(id=1, hero_id=1, team_id=2, role="scout"))


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Sessions]:
    engine = create_engine(url, profile=PoolProfile.LIGHT, application_name="test")
    yield make_sessions(engine)
    await engine.dispose()


@pytest.fixture(scope="module")
def settled(bulwark_databases: Databases) -> Iterator[str]:
    """A database that no test commits anything to."""
    with bulwark_databases.fresh() as url:
        asyncio.run(settle(url))
        yield url


@pytest.fixture
async def sessions(settled: str) -> AsyncIterator[Sessions]:
    async with opened(settled) as sessions:
        yield sessions


@pytest.fixture
async def town(sessions: Sessions) -> AsyncIterator[AsyncSession]:
    """A session that has read nothing yet."""
    async with sessions() as session:
        yield session


def along(relationship: Any) -> orm.QueryableAttribute[Any]:
    assert isinstance(relationship, orm.QueryableAttribute)
    return relationship


TEAM, HEROES = along(Hero.team), along(Team.heroes)
IN_TEAM = col(Hero.team_id) == col(Team.id)
COUNT = sa.func.count()

QUERIES: dict[str, tuple[sa.Select[Any] | sa.CompoundSelect[Any], Any, Any]] = {
    # query, what it gives, what it gives with deleted rows
    "entities": (sa.select(Hero), [1, 3], [1, 2, 3]),
    "columns": (sa.select(col(Hero.id)), [1, 3], [1, 2, 3]),
    "count": (sa.select(COUNT).select_from(Hero), [2], [3]),
    "alias": (sa.select(Alias), [1, 3], [1, 2, 3]),
    "subquery": (sa.select(sa.select(Hero).subquery().c.id), [1, 3], [1, 2, 3]),
    "alias of a subquery": (
        sa.select(orm.aliased(Hero, sa.select(Hero).subquery())),
        [1, 3],
        [1, 2, 3],
    ),
    "common table expression": (sa.select(sa.select(col(Hero.id)).cte().c.id), [1, 3], [1, 2, 3]),
    "scalar subquery": (
        sa.select(sa.select(COUNT).where(IN_TEAM).correlate(Team).scalar_subquery()).select_from(
            Team
        ),
        [1],
        [1, 2],
    ),
    "exists": (
        sa.select(col(Team.id)).where(sa.exists(sa.select(Hero).where(IN_TEAM))),
        [1],
        [1, 2],
    ),
    "any": (sa.select(Team).where(HEROES.any(col(Hero.name) == "Bob")), [], [1]),
    "has": (sa.select(Hero).where(TEAM.has(col(Team.name) == "dead")), [], [3]),
    "in": (
        sa.select(Team).where(col(Team.id).in_(sa.select(col(Hero.team_id)))),
        [1],
        [1, 2],
    ),
    "join along a relationship": (sa.select(Hero).join(TEAM), [1], [1, 2, 3]),
    "join on a condition": (sa.select(Hero).join(Team, IN_TEAM), [1], [1, 2, 3]),
    "join by where": (sa.select(Hero).where(IN_TEAM), [1], [1, 2, 3]),
    "outer join": (sa.select(col(Team.id)).select_from(Hero).outerjoin(TEAM), [1, None], [1, 1, 2]),
    "join to itself": (
        sa.select(Hero).join(Inner, col(Inner.team_id) == col(Hero.team_id)),
        [1, 3],
        [1, 1, 2, 2, 3],
    ),
    "union": (sa.union(sa.select(col(Hero.id)), sa.select(col(Team.id))), [1, 3], [1, 2, 3]),
    "union in a subquery": (
        sa.select(sa.union_all(sa.select(col(Hero.id)), sa.select(col(Team.id))).subquery().c[0]),
        [1, 1, 3],
        [1, 1, 2, 2, 3],
    ),
    "first and offset": (sa.select(Hero).order_by(col(Hero.id)).offset(1).limit(1), [3], [2]),
    "for update": (sa.select(Hero).with_for_update(key_share=True), [1, 3], [1, 2, 3]),
}


def ids(found: Any) -> list[int | None]:
    return sorted(
        (getattr(one, "id", one) for one in found),
        key=lambda one: sys.maxsize if one is None else one,
    )


@pytest.mark.parametrize("name", QUERIES)
async def test_a_query_reads_live_rows_only(town: AsyncSession, name: str) -> None:
    query, live, _ = QUERIES[name]
    assert ids(await town.scalars(query)) == live


@pytest.mark.parametrize("name", QUERIES)
async def test_a_query_that_asks_reads_deleted_rows_too(town: AsyncSession, name: str) -> None:
    query, _, all_rows = QUERIES[name]
    assert ids(await town.scalars(query, execution_options=INCLUDE_DELETED)) == all_rows
    assert ids(await town.scalars(query.execution_options(**INCLUDE_DELETED))) == all_rows


async def test_a_session_that_asks_reads_deleted_rows_with_every_query(
    town: AsyncSession, sessions: Sessions
) -> None:
    async with sessions(execution_options=INCLUDE_DELETED) as session:
        assert ids(await session.scalars(sa.select(Hero))) == [1, 2, 3]
        hero = await session.get_one(Hero, 3)
        await session.refresh(hero, ["team"])
        assert hero.team is not None
        await session.refresh(await session.get_one(Hero, 2))


async def test_a_query_may_be_asked_both_ways_in_turn(town: AsyncSession) -> None:
    query = sa.select(col(Hero.id))
    for _ in range(2):
        assert ids(await town.scalars(query)) == [1, 3]
        assert ids(await town.scalars(query, execution_options=INCLUDE_DELETED)) == [1, 2, 3]


@pytest.mark.parametrize("load", [orm.joinedload, orm.selectinload, orm.subqueryload])
async def test_relationships_loaded_along_give_live_rows(town: AsyncSession, load: Any) -> None:
    heroes = (await town.scalars(sa.select(Hero).options(load(TEAM)))).unique().all()
    assert {one.id: one.team and one.team.id for one in heroes} == {1: 1, 3: None}

    team = (await town.scalars(sa.select(Team).options(load(HEROES)))).unique().one()
    assert ids(team.heroes) == [1]

    (scout,) = await town.scalars(sa.select(Membership).options(load(along(Membership.team))))
    assert scout.team is None


@pytest.mark.parametrize("load", [orm.joinedload, orm.selectinload, orm.subqueryload])
async def test_relationships_loaded_along_give_deleted_rows_to_who_asks(
    town: AsyncSession, load: Any
) -> None:
    query = sa.select(Team).options(load(HEROES)).execution_options(**INCLUDE_DELETED)
    teams = (await town.scalars(query)).unique().all()
    assert {one.id: ids(one.heroes) for one in teams} == {1: [1, 2], 2: [3]}


def lazily(team: Team) -> list[int | None]:
    return ids(team.heroes)


@pytest.mark.parametrize(
    ("options", "expected"), [({}, [1]), (INCLUDE_DELETED, [1, 2])], ids=["live", "deleted"]
)
async def test_a_relationship_loaded_later_is_read_as_its_object_was(
    town: AsyncSession, options: Any, expected: list[int]
) -> None:
    team = await town.get_one(Team, 1, execution_options=options)
    assert await town.run_sync(lambda _: lazily(team)) == expected


async def test_the_relationship_of_an_object_that_was_never_read_gives_live_rows(
    town: AsyncSession,
) -> None:
    team = Team(id=9, name="new")
    town.add(team)
    await town.flush()
    for number, deleted_at in enumerate((None, DELETED)):
        values = {"name": "x", "team_id": team.id, "deleted_at": deleted_at}
        await town.execute(sa.insert(HERO), {**values, "id": 10 + number})
    assert await town.run_sync(lambda _: lazily(team)) == [10]


async def test_a_row_is_got_by_its_key_while_it_lives(town: AsyncSession) -> None:
    assert await town.get(Hero, 2) is None
    assert await town.get(Hero, 1) is not None
    assert await town.get(Hero, 2, execution_options=INCLUDE_DELETED) is not None


async def test_a_row_deleted_meanwhile_cannot_be_refreshed(
    town: AsyncSession,
) -> None:
    hero = await town.get_one(Hero, 1)
    watcher = await town.get_one(Team, 1, execution_options=INCLUDE_DELETED)
    for table in ("hero", "team"):
        await town.execute(sa.text(f"UPDATE {table} SET deleted_at = '{DELETED}'"))
    with pytest.raises(InvalidRequestError, match="Could not refresh"):
        await town.refresh(hero)
    await town.refresh(watcher)
    assert watcher.deleted_at == DELETED


async def test_an_object_that_one_deletes_stays_readable(town: AsyncSession) -> None:
    hero = await town.get_one(Hero, 1)
    hero.deleted_at = DELETED
    await town.flush()
    town.expire(hero, ["name"])
    assert await town.run_sync(lambda _: hero.name) == "Ann"


async def test_an_object_may_be_sent_elsewhere_and_come_back(town: AsyncSession) -> None:
    team = pickle.loads(pickle.dumps(await town.get_one(Team, 1)))
    town.expunge_all()
    town.add(team)
    assert await town.run_sync(lambda _: lazily(team)) == [1]


# What is left alone


async def test_core_and_text_read_every_row(town: AsyncSession) -> None:
    assert ids(await town.scalars(sa.select(HERO.c.id))) == [1, 2, 3]
    assert ids(await town.scalars(sa.text("SELECT id FROM hero"))) == [1, 2, 3]
    as_entities = sa.select(Hero).from_statement(sa.text("SELECT * FROM hero"))
    assert ids(await town.scalars(as_entities)) == [1, 2, 3]


async def test_updates_and_deletes_do_what_they_say(town: AsyncSession) -> None:
    changed = sa.update(Hero).values(age=7).returning(col(Hero.id))
    assert ids(await town.scalars(changed)) == [1, 2, 3]
    named = sa.select(col(Team.id)).where(col(Team.name) == "dead")
    removed = sa.delete(Hero).where(col(Hero.team_id).in_(named)).returning(col(Hero.id))
    assert ids(await town.scalars(removed)) == [3]


async def test_an_insert_from_a_query_takes_every_row(town: AsyncSession) -> None:
    heroes = sa.select(col(Hero.id) + 100, col(Hero.name))
    copied = sa.insert(Team).from_select(["id", "name"], heroes)
    assert len((await town.scalars(copied.returning(col(Team.id)))).all()) == 3


# Models of others


class Leaflet(SoftDeletable, Identified, table=True):
    """Mapped after sessions were made, as models named in the settings may be."""

    metadata = sa.MetaData()
    above_id: int | None = Field(default=None, foreign_key="leaflet.id")


async def test_a_table_that_is_mapped_later_is_known(town: AsyncSession) -> None:
    await town.scalars(sa.select(Hero))

    class Banner(SoftDeletable, Identified, table=True):
        metadata = sa.MetaData()

    for one in (Leaflet, Banner):
        await (await town.connection()).run_sync(one.metadata.create_all)
    town.add_all([Banner(id=1), Banner(id=2, deleted_at=DELETED)])
    await town.flush()
    assert ids(await town.scalars(sa.select(Banner))) == [1]


async def test_a_table_that_refers_to_itself_is_read_live_on_both_sides(town: AsyncSession) -> None:
    await (await town.connection()).run_sync(Leaflet.metadata.create_all)
    rows = [(1, None, DELETED), (2, 1, None), (3, 2, None)]
    for key, above, deleted_at in rows:
        town.add(Leaflet(id=key, above_id=above, deleted_at=deleted_at))
        await town.flush()
    upper = orm.aliased(Leaflet)
    below = sa.select(Leaflet).join(upper, col(upper.id) == col(Leaflet.above_id))
    assert ids(await town.scalars(below)) == [3]
    assert ids(await town.scalars(below, execution_options=INCLUDE_DELETED)) == [2, 3]


async def test_a_table_without_deletion_is_read_as_it_is(town: AsyncSession) -> None:
    await (await town.connection()).run_sync(unusual_models.metadata.create_all)
    town.add(unusual_models.Country(code="NL", name="Netherlands"))
    await town.flush()
    query = sa.select(unusual_models.Country)
    (country,) = await town.scalars(query)
    await town.refresh(country)
    assert country.name == "Netherlands"
