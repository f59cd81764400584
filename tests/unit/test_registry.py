"""Models are found by convention, and one that breaks it is named with its module."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from sqlmodel import SQLModel

from db.errors import ModelError, UnknownModel
from db.models.hero import Hero, HeroCreate, HeroPublic, HeroUpdate
from db.registry import discover_models

ROOT = Path(__file__).parents[2]
numbers = count()

WriteModule = Callable[[str], str]

VILLAIN = """
from sqlmodel import Field, SQLModel
from db.columns import SENSITIVE, Identified

class {name}Base(SQLModel):
    plan: str = Field(sa_column_kwargs={plan_options})

class {name}({name}Base, Identified, table=True):
    __tablename__ = "{table}"
    __table_args__ = {{"schema": {schema!r}}}

class {name}Create({name}Base): ...
class {name}Public({name}Base): ...
class {name}Update(SQLModel):
    plan: str = ""
"""


def villain(name: str, table: str = "", schema: str | None = None, plan_options: str = "{}") -> str:
    return VILLAIN.format(
        name=name, table=table or name.lower(), schema=schema, plan_options=plan_options
    )


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WriteModule]:
    """Write a module that can be imported; its tables are forgotten after the test."""
    tables_before = set(SQLModel.metadata.tables.values())
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source: str) -> str:
        name = f"extra_models_{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    yield write
    for table in set(SQLModel.metadata.tables.values()) - tables_before:
        SQLModel.metadata.remove(table)


def test_every_module_of_the_package_gives_its_model() -> None:
    assert set(discover_models()) == {"team", "hero", "membership", "transfer"}


def test_a_model_knows_its_table_and_its_classes() -> None:
    model = discover_models().get("hero")
    assert model.table is SQLModel.metadata.tables["hero"]
    assert (model.table_class, model.create) == (Hero, HeroCreate)
    assert (model.public, model.update) == (HeroPublic, HeroUpdate)
    assert model.sensitive_columns == {"secret_name"}


@pytest.mark.parametrize("name", ["hero", "Hero", "HERO"])
def test_a_model_is_found_by_its_table_or_its_class_in_any_case(name: str) -> None:
    registry = discover_models()
    assert registry.get(name).table_class is Hero
    assert name in registry


def test_a_mistyped_name_is_answered_with_the_near_one() -> None:
    registry = discover_models()
    with pytest.raises(UnknownModel, match=r"'heros': did you mean hero\?"):
        registry.get("heros")
    assert "heros" not in registry


def test_a_name_near_to_none_is_answered_with_all_of_them() -> None:
    with pytest.raises(UnknownModel, match="the models are: hero, membership, team, transfer"):
        discover_models().get("xyzzy")


def test_a_named_module_adds_its_models_and_changes_no_file(module: WriteModule) -> None:
    registry = discover_models([module(villain("Goblin"))])
    assert registry.get("goblin").create.__name__ == "GoblinCreate"
    assert "hero" in registry


def test_a_named_package_is_walked(tmp_path: Path, module: WriteModule) -> None:
    name = module("")
    (tmp_path / f"{name}.py").unlink()
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    (tmp_path / name / "riddler.py").write_text(villain("Riddler"))
    assert "riddler" in discover_models([name])


def test_a_module_named_twice_counts_once(module: WriteModule) -> None:
    name = module(villain("Penguin"))
    assert "penguin" in discover_models([name, name])


@pytest.mark.parametrize("missing", ["Create", "Public", "Update"])
def test_a_table_without_one_of_its_classes_is_an_error_that_names_the_module(
    module: WriteModule, missing: str
) -> None:
    name = module(villain(f"Lone{missing}") + f"\ndel Lone{missing}{missing}")
    with pytest.raises(ModelError, match=rf"{name} .* no class Lone{missing}{missing}"):
        discover_models([name])


def test_two_models_of_one_table_name_are_an_error(module: WriteModule) -> None:
    name = module(villain("Champion", table="hero", schema="elsewhere"))
    with pytest.raises(ModelError, match=rf"'hero': db\.models\.hero\.Hero and {name}\.Champion"):
        discover_models([name])


def test_two_models_of_one_table_are_an_error_that_names_the_module(module: WriteModule) -> None:
    name = module(villain("Paladin", table="hero"))
    with pytest.raises(ModelError, match=rf"{name}.*'hero' is already defined"):
        discover_models([name])


def test_a_field_that_is_no_column_is_an_error(module: WriteModule) -> None:
    name = module(villain("Joker") + "\nclass JokerCreate(JokerBase):\n    plann: str\n")
    with pytest.raises(ModelError, match=r"JokerCreate has the field 'plann'.*table joker"):
        discover_models([name])


def test_a_field_that_the_database_computes_is_an_error(module: WriteModule) -> None:
    source = villain("Riddler")
    computed = "plan: str = Field(sa_column=sa.Column(sa.Text, sa.Computed(\"'none'\")))"
    source = source.replace("plan: str = Field(sa_column_kwargs={})", computed)
    name = module("import sqlalchemy as sa\n" + source)
    with pytest.raises(ModelError, match="has the field 'plan', which the database computes"):
        discover_models([name])


def test_a_sensitive_column_in_the_public_class_is_an_error(module: WriteModule) -> None:
    name = module(villain("Bane", plan_options="SENSITIVE"))
    with pytest.raises(ModelError, match="BanePublic shows the sensitive column 'plan'"):
        discover_models([name])


def test_a_sensitive_column_in_a_primary_key_is_an_error(module: WriteModule) -> None:
    source = villain("Clayface", plan_options="SENSITIVE")
    name = module(
        source.replace("plan: str = Field(", "plan: str = Field(primary_key=True, ")
        + "\nclass ClayfacePublic(SQLModel): ...\n"
    )
    with pytest.raises(
        ModelError, match=r"Clayface has the sensitive column 'plan' in its primary"
    ):
        discover_models([name])


@pytest.mark.parametrize(
    ("onupdate", "why"),
    [
        ("lambda context: context.get_current_parameters()['plan']", "cannot be evaluated"),
        ("lambda: [1]", "cannot be written as SQL"),
        ("7", "cannot be written as SQL"),
    ],
)
def test_an_onupdate_that_is_of_no_use_in_bulk_is_an_error(
    onupdate: str, why: str, module: WriteModule
) -> None:
    name = f"Joker{next(numbers)}"
    named = module(villain(name, plan_options=f"{{'onupdate': {onupdate}}}"))
    with pytest.raises(ModelError, match=rf"onupdate of {name.lower()}\.plan {why}"):
        discover_models([named])


def test_a_module_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ModelError, match="'no_such_models' cannot be imported"):
        discover_models(["no_such_models"])


def test_a_named_module_without_any_model_is_an_error(module: WriteModule) -> None:
    name = module("x = 1\n")
    with pytest.raises(ModelError, match=f"'{name}' has no model"):
        discover_models([name])


@pytest.mark.parametrize("name", ["team", "hero", "membership", "transfer"])
def test_importing_one_model_alone_is_enough_to_use_it(name: str) -> None:
    program = f"import db.models.{name} as m; m.{name.title()}()"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
