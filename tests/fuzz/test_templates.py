"""Mappings, templates and filters of any text are understood or refused in one sentence."""

from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.catalog import TableFacts, read_facts
from db.registry import Model, discover_models
from jobs._errors import InputError
from jobs._filter import parse_filter
from jobs._mapping import Request
from jobs._planning import make_plan
from tests.fuzzing import JSON, Tried, fuzzed

MODELS = discover_models()
COLUMNS = ["name", "age", "club", "a b", "{x}", "x!r", "x:>9", "é", '"; DROP TABLE team; --', "%s"]

braces = st.lists(
    st.sampled_from(["{", "}", "{{", "}}", "name", "age", "!", ":", "!r", ".", "[0]", "{name}"])
    | st.sampled_from(["{name!r}", "{age:>9}", "{x!r}", "{x:>9}", "{0}", "{}", "\0", "\ud800", " "])
    | st.text(max_size=4),
    max_size=8,
).map("".join)
words = (
    st.sampled_from([*COLUMNS, "team.name", "team_id.name", "team.", ".name", "hero.name", "team"])
    | braces
)
sides = st.dictionaries(words, words | braces, max_size=3)
values = (
    JSON
    | st.sampled_from(["\0", "\ud800", 10**400, float("inf"), float("nan"), [], {}, -(2**31) - 1])
    | st.text(max_size=3)
)
columns = st.sampled_from(
    ["id", "name", "age", "email", "team_id", "secret_name", "created_at", "deleted_at", "version"]
)
operators = st.sampled_from(["eq", "ne", "lt", "le", "gt", "ge", "in", "not_in", "like"])
conditions = st.dictionaries(
    columns | words,
    values
    | st.lists(values, max_size=3)
    | st.dictionaries(operators | st.text(max_size=3), values | st.lists(values), max_size=2),
    min_size=1,  # a payload has no empty filter
    max_size=3,
)
ROW = ["Ann", 5, None, "", [1, {"a": "\ud800"}], 1.5, True, "x" * 99, {}, "{name}"]
TEXTS = {
    "name": "Ann",
    "age": "5",
    "club": "",
    "a b": "",
    "x!r": "1.5",
    "x:>9": "true",
    "é": "x" * 99,
    '"; DROP TABLE team; --': "{}",
    "%s": "{name}",
}
"""The row as a CSV would have it, by column; one whose name has braces cannot be filled in."""
literals = st.text(max_size=4) | st.sampled_from(
    ["{", "}", "{}", "{{", "}}", "{name}", "!r", ":>9", "\\", "%s", "\0", "\ud800"]
)


@pytest.fixture
async def facts(sessions: async_sessionmaker[AsyncSession]) -> dict[str, TableFacts]:
    async with sessions() as session:
        return {one.name: await read_facts(session, one.table) for one in MODELS.values()}


@fuzzed(500)
@given(
    table=st.sampled_from(["hero", "team", "membership"]),
    map_=sides,
    constants=st.dictionaries(words, values, max_size=2),
    where=st.dictionaries(words, st.text(max_size=3), max_size=1),
    ignore=st.lists(words, max_size=2),
    partial=st.booleans(),
)
async def test_any_mapping_makes_fields_of_a_row_or_is_refused_in_a_sentence(
    table: str,
    map_: dict[str, str],
    constants: dict[str, Any],
    where: dict[str, str],
    ignore: list[str],
    partial: bool,
    facts: dict[str, TableFacts],
    tried: Tried,
) -> None:
    tried.one()
    request = Request(map_, constants, where, ignore, True)
    create = MODELS.get(table).create
    try:
        plan = make_plan(request, COLUMNS, table, create, facts[table], partial=partial)
    except InputError as error:
        assert str(error)  # noqa: PT017 - either way is right
        return
    assert isinstance(plan.selects(ROW), bool)
    assert set(plan.fields(ROW)) <= set(create.model_fields)
    assert len(plan.columnwise([ROW, ROW])) <= len(create.model_fields)


@fuzzed(500)
@given(template=braces)
async def test_any_template_makes_text_or_is_refused_in_a_sentence(
    template: str, facts: dict[str, TableFacts], tried: Tried
) -> None:
    tried.one()
    try:
        made = _email("{" + template + "}", facts)
    except InputError as error:
        assert str(error)  # noqa: PT017 - either way is right
        return
    assert made is None or isinstance(made, str)


@fuzzed(500)
@given(
    pieces=st.lists(
        st.tuples(literals, st.none()) | st.tuples(st.just(""), st.sampled_from([*TEXTS])),
        min_size=1,
        max_size=6,
    )
)
async def test_a_template_keeps_its_literals_and_fills_in_its_columns(
    pieces: list[tuple[str, str | None]], facts: dict[str, TableFacts], tried: Tried
) -> None:
    """One column at least: without any the text would be no template."""
    tried.one()
    pieces.append(("", "name"))
    template, wanted = "", ""
    for literal, column in pieces:
        template += literal.replace("{", "{{").replace("}", "}}")
        template += "" if column is None else "{" + column + "}"
        wanted += literal if column is None else TEXTS[column]
    assert _email(template, facts) == wanted


@pytest.mark.parametrize("column", [column for column, text in TEXTS.items() if not text])
async def test_a_template_that_gives_no_text_gives_null(
    column: str, facts: dict[str, TableFacts]
) -> None:
    assert _email("{" + column + "}", facts) is None


def _email(template: str, facts: dict[str, TableFacts]) -> Any:
    """What the template makes of the row."""
    request = Request({"email": template}, {"name": "x"}, {}, ["name"], True)
    plan = make_plan(request, COLUMNS, "hero", MODELS.get("hero").create, facts["hero"])
    return plan.fields(ROW)["email"]


async def _ask(session: AsyncSession, model: Model, given_: dict[str, Any]) -> int:
    found = parse_filter(given_, model)
    query = sa.select(sa.func.count()).select_from(model.table).where(found.condition)
    return int(await session.scalar(query) or 0)


@fuzzed(300)
@given(table=st.sampled_from(["hero", "team", "transfer"]), asked=conditions)
@example(table="hero", asked={"email": {"like": "\0"}})
@example(table="hero", asked={"secret_name": "\0"})
@example(table="hero", asked={"name": {"like": "\ud800"}})
async def test_any_filter_is_a_question_that_postgresql_answers_or_is_refused_in_a_sentence(
    table: str, asked: dict[str, Any], sessions: async_sessionmaker[AsyncSession], tried: Tried
) -> None:
    tried.one()
    async with sessions() as session:
        try:
            assert await _ask(session, MODELS.get(table), asked) == 0
        except InputError as error:
            assert "--filter" in str(error)  # noqa: PT017 - either way is right
