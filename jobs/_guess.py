"""Guessing what an input is for: which model, and which of its columns goes into which field.

A column is known by its name first: the field's own, spelt otherwise, with the table's name before
it, or that of a table whose rows it names. A column whose values do not fit is not taken, and
where two things are equally likely neither is: both are named as a doubt.
"""

import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from enum import IntEnum
from typing import Any

from db.catalog import ForeignKey, TableFacts
from db.registry import Model, Registry
from jobs._errors import InputError
from jobs._mapping import OWN_PREFIX, Request, natural_key
from jobs._part import ABSENT, Part
from jobs._problems import problem_with

LEAST_FITTING = 0.5
"""A column goes into a field if that takes so many of its values."""
LEAST_KNOWN = 0.9
"""A column with any name refers to a table if that has so many of its values as keys."""
NEAREST_MODELS = 3

_SYNONYMS = {"mail": "email", "emailaddress": "email", "mailaddress": "email", "fullname": "name"}
_FLAGS = {"true", "false", "yes", "no", "t", "f", "y", "n"}


class Clue(IntEnum):
    """Why a column may belong to a field, from the weakest to the strongest."""

    VALUES = 1
    SYNONYM = 2
    TABLE = 3
    SPELLING = 4
    NAME = 5


_WHY = {
    Clue.VALUES: "its values are there as {target}",
    Clue.SYNONYM: "another word for {target}",
    Clue.TABLE: "named after the table",
    Clue.SPELLING: "the field's name, spelt otherwise",
    Clue.NAME: "the field's name",
}


@dataclass(frozen=True)
class Column:
    """A column of a sample: its kind of values, and those values, each once."""

    name: str
    kind: str
    values: tuple[Any, ...]
    empty: int


@dataclass(frozen=True)
class Target:
    """Where a column may go: into a field, or as the natural key of the row that goes there."""

    field: str
    text: str
    clue: Clue

    @property
    def why(self) -> str:
        return _WHY[self.clue].format(target=self.text)


@dataclass(frozen=True)
class Relation:
    """A table that the model refers to, and the columns by which an input may name its rows."""

    key: ForeignKey
    table: str
    names: tuple[str, ...]
    alone: bool

    @property
    def field(self) -> str:
        """The model's field that holds the reference."""
        return self.key.columns[0]

    def target(self, name: str) -> str:
        """The row's natural key as --map has it."""
        return f"{self.table if self.alone else self.field}.{name}"


Known = Mapping[str, TableFacts]
"""The facts of each model's table, by the model's name."""

Found = Mapping[str, set[str]]
"""Natural keys, as --map has them, that have (nearly) all values of a column: by column."""


@dataclass
class Fit:
    """How well an input fits one model: what its columns become, and what remains open."""

    model: Model
    taken: dict[str, Target] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    misfits: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    given: int = 0
    named_by_file: bool = False

    @property
    def rank(self) -> tuple[int, int]:
        return (
            len(self.taken) + self.given + self.named_by_file,
            sum(target.clue for target in self.taken.values()),
        )

    @property
    def possible(self) -> bool:
        return bool(self.taken or self.given) and not self.missing


# What is in a column


def columns_of(names: Sequence[str], part: Part) -> list[Column]:
    """The columns of a sample; rows that cannot be read do not count."""
    rows = [row for position, row in enumerate(part.rows) if position not in part.faults]
    return [_column(name, [row[index] for row in rows]) for index, name in enumerate(names)]


def _column(name: str, cells: Sequence[Any]) -> Column:
    given = [cell for cell in cells if cell is not None and cell is not ABSENT]
    values = tuple({repr(cell): cell for cell in given}.values())
    return Column(name, kind_of(values), values, len(cells) - len(given))


def kind_of(values: Sequence[Any]) -> str:
    """The narrowest kind that all values are of."""
    if not values:
        return "empty"
    if not all(isinstance(value, str) for value in values):
        return " or ".join(sorted({type(value).__name__ for value in values}))
    return next((kind for kind, fits in _KINDS.items() if all(map(fits, values))), "text")


def _matches(pattern: str) -> Callable[[str], bool]:
    whole = re.compile(pattern)
    return lambda text: whole.fullmatch(text) is not None


def _reads(parse: Callable[[str], Any]) -> Callable[[str], bool]:
    def reads(text: str) -> bool:
        try:
            parse(text)
        except ValueError:
            return False
        return True

    return reads


_KINDS: Mapping[str, Callable[[str], bool]] = {
    "int": _matches(r"[+-]?\d+"),
    "float": _matches(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"),
    "bool": lambda text: text.lower() in _FLAGS,
    "date": _reads(date.fromisoformat),
    "datetime": _reads(datetime.fromisoformat),
    "email": _matches(r"[^@\s]+@[^@\s]+\.[^@\s]+"),
}


# Which model


def relations_of(model: Model, facts: TableFacts, models: Registry, known: Known) -> list[Relation]:
    """The tables whose rows an input of the model may name; `known` are the facts of all."""
    keys = [
        key
        for key in facts.foreign_keys
        if len(key.columns) == 1
        and key.columns[0] in model.create.model_fields
        and _bare(key) in known
        and _bare(key) != model.name
    ]
    tables = Counter(map(_bare, keys))
    return [
        Relation(key, table, _natural_keys(models.get(table), known[table]), tables[table] == 1)
        for key in keys
        for table in [_bare(key)]
    ]


def _bare(key: ForeignKey) -> str:
    return key.table.rpartition(".")[2].strip('"')


def _natural_keys(model: Model, facts: TableFacts) -> tuple[str, ...]:
    def names_a_row(name: str) -> bool:
        try:
            natural_key(model.table, facts, name)
        except InputError:
            return False
        return True

    return tuple(filter(names_a_row, model.table.columns.keys()))


def best(fits: Sequence[Fit], file: str) -> Fit:
    """The model that the input fits best. Raises InputError when there is none, or several."""
    ranked = sorted(fits, key=lambda fit: fit.rank, reverse=True)
    possible = [fit for fit in ranked if fit.possible]
    if not possible:
        raise InputError(_none_fits(ranked, file))
    equal = [fit.model.name for fit in possible if fit.rank == possible[0].rank]
    if len(equal) > 1:
        raise InputError(
            f"{listed(equal)} fit {file} equally well; say which one it is, as in "
            f"bulwark import {equal[0]} {shlex.quote(file)} --plan"
        )
    return possible[0]


def _none_fits(ranked: Sequence[Fit], file: str) -> str:
    near = [
        f"{fit.model.name} lacks {listed(fit.missing)}"
        if fit.missing
        else f"{fit.model.name} has no such columns"
        for fit in ranked[:NEAREST_MODELS]
    ]
    doubts = [doubt for fit in ranked[:1] for doubt in fit.doubts]
    return f"no model fits {file}: {'; '.join([*near, *doubts])}; name columns with --map"


# Which column goes where


def fit(
    model: Model,
    columns: Sequence[Column],
    relations: Sequence[Relation],
    given: Request,
    file_name: str,
    found: Found,
) -> Fit:
    """Match the columns that the request leaves open with the fields that it leaves open."""
    fields, strange = _given_fields(given, model, relations)
    done = {*given.ignore, *(left for left, right in given.map.items() if "{" not in right)}
    guess = Fit(model, given=len(fields), named_by_file=_names_model(file_name, model))
    candidates: list[tuple[Column, Target]] = []
    for column in columns:
        if column.name in done or column.name.startswith(OWN_PREFIX):
            continue
        for target in _targets(column, model, relations, found.get(column.name, set())):
            if target.field in fields:
                continue
            if problem := _misfit(column, target, model):
                guess.misfits[column.name] = problem
            else:
                candidates.append((column, target))
    _settle(guess, candidates)
    required = [name for name, one in model.create.model_fields.items() if one.is_required()]
    given_now = {*fields, *(target.field for target in guess.taken.values())}
    guess.missing = [*strange, *(name for name in required if name not in given_now)]
    return guess


def _given_fields(
    given: Request, model: Model, relations: Sequence[Relation]
) -> tuple[set[str], list[str]]:
    """The fields that the request itself gives, and what it gives that the model does not have."""
    fields, strange = set[str](), list[str]()
    for name in (*given.constants, *(_target(*pair) for pair in given.map.items())):
        table, dot, _ = name.partition(".")
        found = {one.field for one in relations if dot and table in (one.table, one.field)}
        found |= {name} & model.create.model_fields.keys()
        fields |= found
        strange += [] if found else [name]
    return fields, strange


def _target(left: str, right: str) -> str:
    """What one option --map leads to."""
    return left if "{" in right else right


def _settle(guess: Fit, candidates: Sequence[tuple[Column, Target]]) -> None:
    """Take what is alone among the strongest clues, then among the next; the rest is a doubt."""
    busy: set[str] = set()
    for clue in sorted(Clue, reverse=True):
        level = [
            (column.name, target)
            for column, target in candidates
            if target.clue == clue and not {f"<{column.name}", f">{target.field}"} & busy
        ]
        by_column = Counter(name for name, _ in level)
        by_field = Counter(target.field for _, target in level)
        for name, target in level:
            if by_column[name] == by_field[target.field] == 1:
                guess.taken[name] = target
            busy |= {f"<{name}", f">{target.field}"}
        guess.doubts += _doubts(guess.model, level, by_column, by_field)


def _doubts(
    model: Model,
    level: Sequence[tuple[str, Target]],
    by_column: Counter[str],
    by_field: Counter[str],
) -> Iterator[str]:
    for name in (name for name, count in by_column.items() if count > 1):
        ways = [f"{name}={target.text}" for column, target in level if column == name]
        yield f"the column {name!r} may be one of several: add {_either(ways)}"
    for field_name in (name for name, count in by_field.items() if count > 1):
        mine = [one for one in level if one[1].field == field_name and by_column[one[0]] == 1]
        if len(mine) > 1:
            ways = [f"{name}={target.text}" for name, target in mine]
            yield f"{model.name}.{field_name} may be given by several: add {_either(ways)}"


def _either(ways: Sequence[str]) -> str:
    return listed([f"--map {shlex.quote(way)}" for way in ways], "or")


def _targets(
    column: Column, model: Model, relations: Sequence[Relation], known_as: set[str]
) -> Iterator[Target]:
    for name in model.create.model_fields:
        if clue := _clue(column, name, model.name):
            yield Target(name, name, clue)
    for relation in relations:
        for name in relation.names:
            text = relation.target(name)
            if text in known_as:
                named = _names_relation(column.name, relation, name)
                yield Target(relation.field, text, Clue.SPELLING if named else Clue.VALUES)
            elif _is_text(column) and _names_relation(column.name, relation, name):
                yield Target(relation.field, text, Clue.TABLE)


def _clue(column: Column, field_name: str, model_name: str) -> Clue | None:
    name, wanted = plain(column.name), plain(field_name)
    if column.name == field_name:
        return Clue.NAME
    if name == wanted:
        return Clue.SPELLING
    if name == plain(model_name) + wanted or (column.kind == "int" and f"{name}id" == wanted):
        return Clue.TABLE
    return Clue.SYNONYM if _SYNONYMS.get(name) == wanted else None


def _names_relation(column: str, relation: Relation, key: str) -> bool:
    """Whether a column is called as a person would call the row that the foreign key means."""
    nouns = {relation.field.removesuffix("_id"), relation.table}
    words = {plain(noun) for noun in nouns}
    called = {name for word in words for name in (*_called(word), word + plain(key))}
    return plain(column) in called


def _is_text(column: Column) -> bool:
    return all(isinstance(value, str) for value in column.values) and column.kind != "int"


def _misfit(column: Column, target: Target, model: Model) -> str | None:
    """Why the values cannot go into the field; keys of other rows are looked up, not checked."""
    if target.text != target.field or not column.values:
        return None
    taken = sum(takes(model, target.field, value) for value in column.values)
    if taken >= LEAST_FITTING * len(column.values):
        return None
    return (
        f"{len(column.values) - taken} of its {len(column.values)} values do not fit "
        f"{model.name}.{target.field}"
    )


def takes(model: Model, field_name: str, value: Any) -> bool:
    """Whether the Create class accepts the value, as far as it says so about a field alone."""
    return problem_with(model.create, field_name, value) is None


def _names_model(file_name: str, model: Model) -> bool:
    words = re.split(r"[\W_\d]+", file_name.casefold())
    return not _called(model.name.casefold()).isdisjoint(words)


def _called(noun: str) -> set[str]:
    """What one or several of a kind are called."""
    return {noun, f"{noun}s", f"{noun}es"}


def listed(names: Sequence[str], last: str = "and") -> str:
    """Names as a sentence has them."""
    *others, final = names
    return f"{', '.join(others)} {last} {final}" if others else final


def plain(name: str) -> str:
    """A name without case, accents, spaces and punctuation."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKD", name)).casefold()
