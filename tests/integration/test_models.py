"""The domain models refuse what does not fit, and the database refuses it as well."""

from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm.exc import StaleDataError
from sqlmodel import SQLModel

from db.models.hero import Hero, HeroCreate, HeroPublic, HeroUpdate
from db.models.membership import Membership, MembershipCreate
from db.models.team import Team, TeamCreate, TeamUpdate
from db.models.transfer import Transfer, TransferCreate, TransferUpdate
from db.registry import Model, discover_models

Sessions = async_sessionmaker[AsyncSession]

MODELS = discover_models().values()
each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
numbers = count(1)
Row = TypeVar("Row", bound=SQLModel)


def new(cls: type[Row], **values: Any) -> Row:
    """A row whose values the type checker leaves to the database."""
    return cls(**values)


def unique(word: str) -> str:
    return f"{word} {next(numbers)}"


# What the classes refuse

BAD_NAMES = ["", " ", "\t\n", "a" * 201, "a\x00b", "\ud800", 7]
BAD_COUNTS = [-1, 2**31, 1.5, "many"]
BAD_REFERENCES = [0, -1, 2**63, "x"]
BAD_EMAILS = [
    "", "ada", "@b", "a@", "a@b@c", "a b@c", "a@b\n", "a@b\x00", "a" * 253 + "@b",
]  # fmt: skip
BAD_INSTANTS = [
    "2024-05-01T12:00:00",
    datetime(2024, 5, 1, 12),  # noqa: DTZ001 - without a time zone, to be refused
    "0001-01-01T00:00:00+00:01",
    "9999-12-31T23:59:00-00:01",
    "yesterday",
]

HERO = {"name": "Ada"}
TEAM = {"name": "Analysts"}
MEMBERSHIP = {"hero_id": 1, "team_id": 1, "role": "scout"}
TRANSFER = {"hero_id": 1}

REFUSED: list[tuple[type[BaseModel], dict[str, Any], str, list[Any]]] = [
    (HeroCreate, HERO, "name", [*BAD_NAMES, None]),
    (HeroCreate, HERO, "secret_name", BAD_NAMES),
    (HeroCreate, HERO, "external_id", BAD_NAMES),
    (HeroCreate, HERO, "age", BAD_COUNTS),
    (HeroCreate, HERO, "email", BAD_EMAILS),
    (HeroCreate, HERO, "team_id", BAD_REFERENCES),
    (HeroCreate, HERO, "id", [1]),
    (HeroCreate, HERO, "nmae", ["Ada"]),
    (HeroUpdate, {}, "name", [*BAD_NAMES, None]),
    (HeroUpdate, {}, "secret_name", BAD_NAMES),
    (HeroUpdate, {}, "age", BAD_COUNTS),
    (HeroUpdate, {}, "email", BAD_EMAILS),
    (HeroUpdate, {}, "nmae", ["Ada"]),
    (TeamCreate, TEAM, "name", [*BAD_NAMES, None]),
    (TeamCreate, TEAM, "roster_limit", BAD_COUNTS),
    (TeamCreate, TEAM, "roster", [1]),
    (TeamUpdate, {}, "name", [*BAD_NAMES, None]),
    (TeamUpdate, {}, "roster_limit", BAD_COUNTS),
    (MembershipCreate, MEMBERSHIP, "hero_id", [*BAD_REFERENCES, None]),
    (MembershipCreate, MEMBERSHIP, "team_id", [*BAD_REFERENCES, None]),
    (MembershipCreate, MEMBERSHIP, "role", [*BAD_NAMES, None]),
    (MembershipCreate, MEMBERSHIP, "rank", ["first"]),
    (TransferCreate, TRANSFER, "hero_id", [*BAD_REFERENCES, None]),
    (TransferCreate, TRANSFER, "from_team_id", BAD_REFERENCES),
    (TransferCreate, TRANSFER, "to_team_id", BAD_REFERENCES),
    (TransferCreate, TRANSFER, "transferred_at", [*BAD_INSTANTS, None]),
    (TransferCreate, TRANSFER, "reason", ["", "a" * 2001, "a\x00b"]),
    (TransferUpdate, {}, "transferred_at", [*BAD_INSTANTS, None]),
]


@pytest.mark.parametrize(
    ("cls", "good", "field", "bad"),
    [(cls, good, field, bad) for cls, good, field, values in REFUSED for bad in values],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_a_bad_value_is_refused_with_its_field(
    cls: type[BaseModel], good: dict[str, Any], field: str, bad: Any
) -> None:
    cls.model_validate(good)
    with pytest.raises(ValidationError) as refusal:
        cls.model_validate({**good, field: bad})
    assert {error["loc"] for error in refusal.value.errors()} == {(field,)}


@pytest.mark.parametrize(
    ("cls", "missing"),
    [
        (HeroCreate, {"name"}),
        (TeamCreate, {"name"}),
        (MembershipCreate, {"hero_id", "team_id", "role"}),
        (TransferCreate, {"hero_id"}),
    ],
)
def test_a_new_row_needs_these_fields_and_no_others(
    cls: type[BaseModel], missing: set[str]
) -> None:
    with pytest.raises(ValidationError) as refusal:
        cls.model_validate({})
    assert {error["loc"][0] for error in refusal.value.errors()} == missing


@each_model
def test_an_update_may_leave_out_everything(model: Model) -> None:
    assert model.update.model_validate({}).model_dump(exclude_unset=True) == {}


@each_model
def test_no_class_that_is_written_takes_a_field_it_does_not_know(model: Model) -> None:
    for written in (model.create, model.update):
        with pytest.raises(ValidationError) as refusal:
            written.model_validate({"nmae": 1})
        assert ("nmae",) in {error["loc"] for error in refusal.value.errors()}


def test_white_space_around_a_name_is_kept() -> None:
    assert HeroCreate(name=" Ada ").name == " Ada "


@each_model
def test_the_length_that_create_allows_is_the_length_of_the_column(model: Model) -> None:
    for name, schema in model.create.model_json_schema()["properties"].items():
        choices = schema.get("anyOf", [schema])
        longest = [choice["maxLength"] for choice in choices if "maxLength" in choice]
        if any(choice.get("type") == "string" and "format" not in choice for choice in choices):
            assert [model.table.c[name].type.length] == longest


async def test_the_outermost_values_that_create_allows_can_be_stored(sessions: Sessions) -> None:
    team = Team(**TeamCreate(name="\U0001f9b8" * 200, roster_limit=2**31 - 1).model_dump())
    hero = Hero(
        **HeroCreate(
            name="n" * 200,
            secret_name="s" * 200,
            external_id="x" * 200,
            email="a" * 252 + "@b",
            age=2**31 - 1,
        ).model_dump()
    )
    last = datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
    moves = [
        TransferCreate(hero_id=1, transferred_at=at, reason="r" * 2000)
        for at in (datetime(1, 1, 1, tzinfo=UTC), last)
    ]
    async with sessions.begin() as session:
        session.add_all([team, hero])
        await session.flush()
        session.add_all(
            new(Transfer, **{**move.model_dump(), "hero_id": hero.id}) for move in moves
        )
    async with sessions() as session:
        stored = (await session.scalars(sa.select(Transfer))).all()
    assert {move.transferred_at for move in stored} == {datetime(1, 1, 1, tzinfo=UTC), last}


# What the database refuses


@pytest.mark.parametrize(
    ("statement", "sqlstate", "named"),
    [
        ("INSERT INTO hero (name, age) VALUES ('Ada', -1)", "23514", "ck_hero_age_not_negative"),
        (
            "INSERT INTO team (name, roster_limit) VALUES ('A', -1)",
            "23514",
            "ck_team_roster_limit_not_negative",
        ),
        ("INSERT INTO hero (age) VALUES (1)", "23502", '"name"'),
        ("INSERT INTO hero (name, team_id) VALUES ('Ada', 0)", "23503", "fk_hero_team_id"),
        ("INSERT INTO hero (name) VALUES (repeat('a', 201))", "22001", "varying(200)"),
        ("INSERT INTO hero (name, email) VALUES ('a', repeat('a', 255))", "22001", "varying(254)"),
        ("INSERT INTO transfer (hero_id) VALUES (0)", "23503", "fk_transfer_hero_id"),
        (
            "INSERT INTO membership (hero_id, team_id, role) VALUES (0, 0, 'r')",
            "23503",
            "fk_membership_",
        ),
    ],
)
async def test_the_database_refuses_it_too(
    sessions: Sessions, statement: str, sqlstate: str, named: str
) -> None:
    async with sessions() as session:
        with pytest.raises(DBAPIError) as refusal:
            await session.execute(sa.text(statement))
    assert getattr(refusal.value.orig, "sqlstate", None) == sqlstate
    assert named in str(refusal.value.orig)


async def people(session: AsyncSession) -> tuple[int, int]:
    hero, team = Hero(name="Ada"), Team(name=unique("team"))
    session.add_all([hero, team])
    await session.flush()
    assert hero.id is not None
    assert team.id is not None
    return hero.id, team.id


async def twins(session: AsyncSession, kind: str) -> tuple[SQLModel, SQLModel]:
    """Two rows of equal natural key."""
    if kind == "membership":
        hero_id, team_id = await people(session)
        row = {"hero_id": hero_id, "team_id": team_id, "role": "scout"}
        return new(Membership, **row), new(Membership, **row)
    if kind == "team":
        return Team(name="Twins"), Team(name="Twins")
    field = kind.removeprefix("hero ")
    return new(Hero, name="a", **{field: "a@b"}), new(Hero, name="b", **{field: "a@b"})


natural_keys = pytest.mark.parametrize(
    ("kind", "index"),
    [
        ("team", "uq_team_name"),
        ("hero email", "uq_hero_email"),
        ("hero external_id", "uq_hero_external_id"),
        ("membership", "uq_membership_hero_id_team_id_role"),
    ],
)


@natural_keys
async def test_two_live_rows_cannot_share_a_natural_key(
    sessions: Sessions, kind: str, index: str
) -> None:
    async with sessions() as session:
        session.add_all(await twins(session, kind))
        with pytest.raises(IntegrityError, match=index):
            await session.flush()


@natural_keys
async def test_a_deleted_row_frees_its_natural_key_until_it_is_wanted_back(
    sessions: Sessions, kind: str, index: str
) -> None:
    async with sessions() as session:
        first, second = await twins(session, kind)
        first.deleted_at = datetime.now(UTC)
        session.add_all([first, second])
        await session.flush()
        first.deleted_at = None
        with pytest.raises(IntegrityError, match=index):
            await session.flush()


async def test_heroes_without_an_email_are_no_duplicates(sessions: Sessions) -> None:
    async with sessions.begin() as session:
        session.add_all([Hero(name="a"), Hero(name="b")])


# What the column sets keep


@each_model
async def test_the_columns_in_the_database_stand_in_the_order_of_the_model(
    sessions: Sessions, model: Model
) -> None:
    query = sa.text(
        "SELECT column_name FROM information_schema.columns "
        "WHERE table_schema = 'public' AND table_name = :name ORDER BY ordinal_position"
    )
    async with sessions() as session:
        columns = list(await session.scalars(query, {"name": model.name}))
    assert columns == list(model.table.columns.keys())
    assert columns[0] == "id"
    assert columns[-4:] == ["created_at", "updated_at", "version", "deleted_at"]


def test_no_two_tables_share_a_column_or_its_identity() -> None:
    columns = [column for model in MODELS for column in model.table.columns]
    identities = [column.identity for column in columns if column.identity is not None]
    assert len({id(column) for column in columns}) == len(columns)
    assert len({id(identity) for identity in identities}) == len(MODELS)
    assert all(identity.column is not None for identity in identities)


async def test_every_foreign_key_is_indexed_over_all_rows(sessions: Sessions) -> None:
    query = """
        SELECT c.conname FROM pg_constraint c
        WHERE c.contype = 'f' AND c.connamespace = 'public'::regnamespace AND NOT EXISTS (
            SELECT FROM pg_index i WHERE i.indrelid = c.conrelid AND i.indpred IS NULL
            AND i.indkey[0] = c.conkey[1])
    """
    async with sessions() as session:
        assert list(await session.scalars(sa.text(query))) == []


async def test_every_constraint_has_the_name_that_the_models_predict(sessions: Sessions) -> None:
    query = """
        SELECT conname FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace AND contype IN ('p', 'f', 'u', 'c')
        AND conrelid <> 'alembic_version'::regclass
        UNION SELECT indexrelid::regclass::text FROM pg_index JOIN pg_class t ON t.oid = indrelid
        WHERE t.relnamespace = 'public'::regnamespace AND t.relname <> 'alembic_version'
    """
    constraints = {str(item.name) for model in MODELS for item in model.table.constraints}
    indexes = {str(item.name) for model in MODELS for item in model.table.indexes}
    async with sessions() as session:
        assert set(await session.scalars(sa.text(query))) == constraints | indexes


async def test_ids_are_64_bits_and_given_by_the_database_unless_they_are_brought(
    sessions: Sessions,
) -> None:
    async with sessions.begin() as session:
        given, brought = Hero(name="a"), Hero(id=2**62, name="b")
        session.add_all([given, brought])
        await session.flush()
        assert given.id == 1
        assert brought.id == 2**62


async def test_the_times_of_a_row_are_those_of_the_database_with_a_time_zone(
    sessions: Sessions,
) -> None:
    hero = Hero(name="Ada")
    async with sessions.begin() as session:
        session.add(hero)
        await session.flush()
        created = await session.scalar(sa.func.now().select())
    assert created is not None
    assert created.utcoffset() == timedelta(0)
    assert (hero.created_at, hero.updated_at) == (created, created)


@pytest.mark.parametrize("through", ["orm", "core"])
async def test_an_update_sets_the_time_by_the_database_and_counts_the_version(
    sessions: Sessions, through: str
) -> None:
    hero = Hero(name="Ada")
    async with sessions.begin() as session:
        session.add(hero)
    created = hero.created_at
    async with sessions.begin() as session:
        updated = await session.scalar(sa.func.now().select())
        if through == "orm":
            session.add(hero)
            hero.name = "Ada L."
        else:
            table = Hero.__table__  # type: ignore[attr-defined]  # SQLAlchemy adds it
            await session.execute(sa.update(table).values(name="Ada L."))
    async with sessions() as session:
        found = (await session.scalars(sa.select(Hero))).one()
    assert (found.name, found.version) == ("Ada L.", 2)
    assert found.created_at == created
    assert found.updated_at == updated != created


async def test_what_the_database_filled_in_is_readable_after_a_flush(sessions: Sessions) -> None:
    hero = Hero(name="Ada")
    async with sessions.begin() as session:
        session.add(hero)
        await session.flush()
        hero.age = 36
        await session.flush()
        assert hero.version == 2
        assert hero.updated_at == hero.created_at


async def test_an_orm_update_of_a_row_read_too_early_is_stopped(sessions: Sessions) -> None:
    async with sessions.begin() as session:
        session.add(Hero(name="Ada"))
    async with sessions() as early, sessions.begin() as late:
        stale = (await early.scalars(sa.select(Hero))).one()
        (await late.scalars(sa.select(Hero))).one().age = 36
        await late.commit()
        stale.name = "Ada L."
        with pytest.raises(StaleDataError):
            await early.flush()


# How the models belong together


async def test_relationships_lead_both_ways(sessions: Sessions) -> None:
    old, present = Team(name=unique("old")), Team(name=unique("new"))
    hero = Hero(name="Ada", team=present)
    membership = new(Membership, hero=hero, team=old, role="adviser")
    transfer = new(Transfer, hero=hero, from_team=old, to_team=present)
    async with sessions.begin() as session:
        session.add_all([hero, membership, transfer])
    async with sessions() as session:
        session.add_all([hero, old, present])
        await session.refresh(hero, ["team", "memberships", "transfers"])
        await session.refresh(old, ["heroes", "memberships", "arrivals", "departures"])
        await session.refresh(present, ["heroes", "memberships", "arrivals", "departures"])
        assert (hero.team, hero.memberships, hero.transfers) == (present, [membership], [transfer])
        assert (old.heroes, old.memberships) == ([], [membership])
        assert (old.arrivals, old.departures) == ([], [transfer])
        assert (present.heroes, present.memberships) == ([hero], [])
        assert (present.arrivals, present.departures) == ([transfer], [])


def test_each_side_of_a_relationship_sees_the_other_before_it_is_stored() -> None:
    team, hero = Team(name="a"), Hero(name="b")
    hero.team = team
    membership = new(Membership, hero=hero, team=team, role="r")
    transfer = new(Transfer, hero=hero, to_team=team)
    assert team.heroes == [hero]
    assert (team.memberships, hero.memberships) == ([membership], [membership])
    assert (team.arrivals, hero.transfers) == ([transfer], [transfer])


async def test_removing_a_team_does_not_make_its_heroes_homeless_in_silence(
    sessions: Sessions,
) -> None:
    async with sessions() as session:
        team = Team(name=unique("team"))
        session.add(Hero(name="Ada", team=team))
        await session.flush()
        await session.delete(team)
        with pytest.raises(IntegrityError, match="fk_hero_team_id"):
            await session.flush()


# What stays inside


def test_the_secret_name_is_marked_sensitive_and_no_other_column_is() -> None:
    marked = {(model.name, column) for model in MODELS for column in model.sensitive_columns}
    assert marked == {("hero", "secret_name")}


async def test_the_public_view_of_a_hero_is_without_the_secret_name(sessions: Sessions) -> None:
    hero = Hero(name="Peter", secret_name="Spider")
    async with sessions.begin() as session:
        session.add(hero)
    shown = HeroPublic.model_validate(hero).model_dump()
    assert set(shown) == {
        "id", "name", "age", "email", "external_id", "team_id",
        "created_at", "updated_at", "version",
    }  # fmt: skip
    assert "Spider" not in str(shown)
