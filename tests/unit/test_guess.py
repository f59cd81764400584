"""Which column goes where is guessed by name, then by values; what is equally likely is a doubt."""

from collections.abc import Mapping, Sequence

import pytest

from db.catalog import ForeignKey
from db.ledger.chunk import Span
from db.registry import discover_models
from jobs._column_kinds import Column, columns_of, kind_of
from jobs._errors import InputError
from jobs._guess import Fit, best, fit
from jobs._mapping import Request
from jobs._part import ABSENT, Part, Values
from jobs._relations import Relation
from jobs._targets import plain

NOTHING = Request({}, {}, {}, [], False)


def relation(field: str, table: str, *names: str, alone: bool = True) -> Relation:
    key = ForeignKey(f"fk_{field}", (field,), f"public.{table}", ("id",))
    return Relation(key, table, names, alone)


RELATIONS = {
    "hero": [relation("team_id", "team", "name")],
    "team": [],
    "membership": [
        relation("hero_id", "hero", "email", "external_id"),
        relation("team_id", "team", "name"),
    ],
    "transfer": [
        relation("hero_id", "hero", "email", "external_id"),
        relation("from_team_id", "team", "name", alone=False),
        relation("to_team_id", "team", "name", alone=False),
    ],
}


def columns(values: Mapping[str, Sequence[str | None]]) -> list[Column]:
    rows: list[Values] = list(zip(*values.values(), strict=True))
    count = len(rows)
    part = Part(1, Span(1, count, 0, 0, 1, 1), rows, range(count), [b""] * count, {})
    return columns_of(list(values), part)


def guessed(
    model: str,
    values: Mapping[str, Sequence[str | None]],
    given: Request = NOTHING,
    file_name: str = "x.csv",
    **found: str,
) -> Fit:
    known = {name: {text} for name, text in found.items()}
    return fit(
        discover_models().get(model), columns(values), RELATIONS[model], given, file_name, known
    )


def taken(found: Fit) -> dict[str, str]:
    return {name: target.text for name, target in found.taken.items()}


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([], "empty"),
        (["1", "-2", "+3"], "int"),
        (["1", "2.5", "1e3", ".5"], "float"),
        (["true", "No", "F"], "bool"),
        (["2026-01-31"], "date"),
        (["2026-01-31", "2026-01-31T10:00:00+01:00"], "datetime"),
        (["a@b.c"], "email"),
        (["1", "a@b.c"], "text"),
        (["2026-02-31"], "text"),
        ([1, 2], "int"),
        ([1, "a"], "int or str"),
    ],
)
def test_a_column_is_of_the_narrowest_kind_that_all_its_values_are_of(
    values: list[object], kind: str
) -> None:
    assert kind_of(values) == kind


def test_empty_cells_are_counted_and_values_stand_once() -> None:
    rows: list[Values] = [["a"], [None], [ABSENT], ["a"], ["b"]]
    part = Part(1, Span(1, 5, 0, 0, 1, 1), rows, range(5), [b""] * 5, {})

    assert columns_of(["x"], part) == [Column("x", "text", ("a", "b"), 2)]


@pytest.mark.parametrize(
    "name", ["external_id", "External ID", "external-id", "EXTERNALID", "hero_external_id"]
)
def test_a_field_is_known_however_it_is_spelt(name: str) -> None:
    assert taken(guessed("hero", {"name": ["Ann"], name: ["1"]}))[name] == "external_id"


def test_accents_and_case_do_not_tell_names_apart() -> None:
    assert plain("Próximo Ténder_Nº") == plain("proximo tender no")


@pytest.mark.parametrize("name", ["team", "Team", "teams", "team_name", "Team Name"])
def test_a_column_named_after_a_table_names_its_rows(name: str) -> None:
    assert taken(guessed("hero", {"name": ["Ann"], name: ["Red"]}))[name] == "team.name"


def test_a_column_of_numbers_named_after_a_table_is_the_key_itself() -> None:
    assert taken(guessed("hero", {"name": ["Ann"], "team": ["7"]}))["team"] == "team_id"


def test_where_two_fields_lead_to_one_table_the_field_is_named() -> None:
    values = {"hero": ["a@b.c"], "from team": ["Red"], "to_team_name": ["Blue"]}

    found = taken(guessed("transfer", values, hero="hero.email"))

    assert found == {
        "hero": "hero.email",
        "from team": "from_team_id.name",
        "to_team_name": "to_team_id.name",
    }


def test_a_row_that_may_be_named_by_two_keys_is_a_doubt() -> None:
    found = guessed("membership", {"hero": ["x"], "team": ["Red"], "role": ["lead"]})

    assert "hero" not in found.taken
    assert found.missing == ["hero_id"]
    (doubt,) = found.doubts
    assert doubt.endswith("add --map hero=hero.email or --map hero=hero.external_id")


def test_values_tell_what_no_name_does_and_less_than_a_name() -> None:
    values = {"name": ["Ann"], "club": ["Red"], "Team": ["Blue"]}

    assert taken(guessed("hero", values, club="team.name"))["Team"] == "team.name"
    del values["Team"]
    assert taken(guessed("hero", values, club="team.name"))["club"] == "team.name"


def test_a_column_goes_into_a_field_only_if_most_values_fit() -> None:
    some = guessed("hero", {"name": ["A", "B", "C"], "age": ["1", "x", "2"]})
    few = guessed("hero", {"name": ["A", "B", "C"], "age": ["1", "x", "y"]})

    assert taken(some) == {"name": "name", "age": "age"}
    assert taken(few) == {"name": "name"}
    assert few.misfits == {"age": "2 of its 3 values do not fit hero.age"}


def test_what_was_asked_for_is_not_guessed_again() -> None:
    values = {"name": ["Ann"], "email": ["a@b.c"], "mail": ["a@b.c"], "team": ["Red"], "age": ["1"]}
    given = Request({"mail": "email", "age": "team.name"}, {"name": "X"}, {}, [], False)

    assert taken(guessed("hero", values, given)) == {}


def test_columns_that_an_export_of_rejects_added_are_passed_over() -> None:
    assert taken(guessed("team", {"bulwark_reason": ["x"], "name": ["Red"]})) == {"name": "name"}


def test_a_model_without_what_was_asked_for_is_not_possible() -> None:
    given = Request({"club": "team.name"}, {}, {}, [], False)
    fits = [guessed(model, {"name": ["Red"], "club": ["Red"]}, given) for model in RELATIONS]

    assert best(fits, "x.csv").model.name == "hero"
    (team,) = [one for one in fits if one.model.name == "team"]
    assert team.missing == ["team.name"]


def test_the_model_with_most_columns_is_the_best() -> None:
    values = {"name": ["Ann"], "age": ["1"], "x": ["y"]}
    fits = [guessed(model, values) for model in RELATIONS]

    assert best(fits, "x.csv").model.name == "hero"


def test_no_better_model_is_taken_that_lacks_a_field() -> None:
    values = {"name": ["Red"], "team": ["Red"], "role": ["lead"]}
    fits = [guessed(model, values) for model in ("membership", "team")]

    assert best(fits, "x.csv").model.name == "team"


def test_models_that_fit_equally_well_are_an_error_with_the_command_to_type() -> None:
    fits = [guessed(model, {"name": ["Red"]}) for model in ("team", "hero")]

    with pytest.raises(InputError, match=r"team and hero fit .* bulwark import team 'a b' --plan"):
        best(fits, "a b")


def test_the_name_of_the_file_counts_as_much_as_a_column() -> None:
    fits = [
        guessed(model, {"name": ["Red"]}, file_name="Heroes_2026.csv") for model in ("hero", "team")
    ]

    assert best(fits, "x").model.name == "hero"
