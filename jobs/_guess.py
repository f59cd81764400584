"""Guessing what an input is for: which model, and which of its columns goes into which field.

A column is known by its name first: the field's own, spelt otherwise, with the table's name before
it, or that of a table whose rows it names. A column whose values do not fit is not taken, and
where two things are equally likely neither is: both are named as a doubt.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from db.registry import Model
from jobs._column_kinds import Column
from jobs._errors import InputError
from jobs._mapping import OWN_PREFIX, Request
from jobs._problems import problem_with
from jobs._relations import Relation
from jobs._targets import Clue, Target, called, targets

LEAST_FITTING = 0.5
"""A column goes into a field if that takes so many of its values."""
LEAST_KNOWN = 0.9
"""A column with any name refers to a table if that has so many of its values as keys."""
NEAREST_MODELS = 3

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
        for target in targets(column, model, relations, found.get(column.name, set())):
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
    return not called(model.name.casefold()).isdisjoint(words)


def listed(names: Sequence[str], last: str = "and") -> str:
    """Names as a sentence has them."""
    *others, final = names
    return f"{', '.join(others)} {last} {final}" if others else final
