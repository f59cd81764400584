"""Matching an input's columns with a model's fields; what cannot be is refused before any row."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import BaseModel

from db.catalog import TableFacts
from jobs._errors import InputError
from jobs._mapping import OWN_PREFIX, Plan, Request
from jobs._nearest import did_you_mean
from jobs._part import Values
from jobs._problems import problem_with, said
from jobs._references import Reference, bare_name, foreign_key
from jobs._template import as_text, filler, pieces_of


def make_plan(
    request: Request,
    columns: Sequence[str],
    model: str,
    create: type[BaseModel],
    facts: TableFacts,
    *,
    partial: bool = False,
) -> Plan:
    """Match the input's columns with the model's fields.

    The rows of a `partial` input say what is to change, and need not give all that a row must have.

    Raises InputError on a column, field or table that is not known, on a field that is given
    twice, on one that must be given and is not, on a constant with which every row would be
    rejected, and on columns that lead nowhere.
    """
    return _Planner(request, list(columns), model, create, facts, partial=partial).plan()


class _Planner:
    def __init__(
        self,
        request: Request,
        columns: list[str],
        model: str,
        create: type[BaseModel],
        facts: TableFacts,
        *,
        partial: bool,
    ) -> None:
        self._request = request
        self._partial = partial
        self._columns = columns
        self._index = {name: index for index, name in enumerate(columns)}
        self._model = model
        self._create = create
        self._facts = facts
        self._used: set[str] = set()
        self._sources: dict[str, str] = {}
        self._givers: dict[str, str] = {}
        self._direct: list[tuple[str, int]] = []
        self._made: list[tuple[str, Callable[[Values], str | None]]] = []
        self._references: list[Reference] = []

    def plan(self) -> Plan:
        for field, value in self._request.constants.items():
            self._give(field, field, "a constant")
            self._require_valid(field, value)
        if not self._columns and not self._request.where:
            return self._plan(())  # rows in a payload may be none at all: nothing is missing then
        for left, right in self._request.map.items():
            self._map(left, right)
        filters = tuple(
            (self._column(name, "--where"), wanted) for name, wanted in self._request.where.items()
        )
        version = self._version_column()
        self._take_by_name()
        self._require_all_used()
        self._require_all_given()
        return self._plan(filters, version)

    def _version_column(self) -> int | None:
        name = self._request.expect_version
        if name is None:
            return None
        if "version" not in {column.name for column in self._facts.columns}:
            raise InputError(f"--expect-version: {self._model} has no version to compare with")
        return self._column(name, "--expect-version")

    def _plan(self, filters: tuple[tuple[int, str], ...], version: int | None = None) -> Plan:
        return Plan(
            tuple(self._direct),
            tuple(self._made),
            dict(self._request.constants),
            tuple(self._references),
            filters,
            self._sources,
            version,
        )

    def _map(self, left: str, right: str) -> None:
        if "{" in right:
            self._give(left, left, f"--map {left}={right}")
            self._made.append((left, self._template(left, right)))
            return
        index = self._column(left, "--map")
        table, dot, key = right.partition(".")
        if dot:
            place = f"--map {left}={right}"
            found = foreign_key(table, place, self._model, self._facts)
            (field,), (target,) = found.columns, found.table_columns
            self._give(field, left, place)
            self._references.append(Reference(left, index, field, bare_name(found), key, target))
        else:
            self._give(right, left, f"--map {left}={right}")
            self._direct.append((right, index))

    def _column(self, name: str, place: str) -> int:
        if name not in self._index:
            raise InputError(
                f"{place}: the input has no column {name!r}{did_you_mean(name, self._columns)}"
            )
        self._used.add(name)
        return self._index[name]

    def _give(self, field: str, source: str, giver: str) -> None:
        known = self._create.model_fields
        if field not in known:
            raise InputError(f"{self._model} has no field {field!r}{did_you_mean(field, known)}")
        if field in self._sources:
            raise InputError(
                f"{self._model}.{field} is given twice, by {self._givers[field]} and by {giver}; "
                "leave one out"
            )
        self._sources[field] = source
        self._givers[field] = giver

    def _require_valid(self, field: str, constant: Any) -> None:
        if problem := problem_with(self._create, field, constant):
            text = as_text(constant)
            quoted = text and problem["type"].endswith("_error") and text in problem["msg"]
            why = "is not valid" if quoted else said(problem)  # the value may be secret
            raise InputError(f"--set {field}: {why}, so that every row would be rejected")

    def _template(self, field: str, template: str) -> Callable[[Values], str | None]:
        place = f"--map {field}={template}"
        return filler(
            [
                (literal, None if name is None else self._column(name, place))
                for literal, name in pieces_of(template, place)
            ]
        )

    def _take_by_name(self) -> None:
        """Columns that are named like a field; one that was put to use otherwise need not be it."""
        for name, index in self._index.items():
            mapped = name in self._request.map and "{" not in self._request.map[name]
            spare = name in self._sources and name in self._used
            if (
                name in self._create.model_fields
                and name not in self._request.ignore
                and not mapped
                and not spare
            ):
                self._give(name, name, f"the column {name!r}, which --ignore passes over")
                self._used.add(name)
                self._direct.append((name, index))

    def _require_all_used(self) -> None:
        for name in self._request.ignore:
            self._column(name, "--ignore")
        unused = [
            name
            for name in self._columns
            if name not in self._used and not name.startswith(OWN_PREFIX)
        ]
        if unused and not self._request.ignore_unknown:
            first = unused[0]
            near = did_you_mean(first, self._create.model_fields)
            others = f" (nor have {len(unused) - 1} more columns)" if len(unused) > 1 else ""
            raise InputError(
                f"column {first!r} has no field in {self._model}{others}{near}; map it with --map, "
                "leave it out with --ignore, or all such columns with --ignore-unknown"
                f"{self._hint()}"
            )

    def _hint(self) -> str:
        """A word about the first line when it looks as if it named no columns."""
        if self._sources.keys() - self._request.constants.keys():
            return ""
        return " (does the first line of the input name the columns?)"

    def _require_all_given(self) -> None:
        for name, field in self._create.model_fields.items():
            if field.is_required() and name not in self._sources:
                raise InputError(
                    f"{self._model}.{name} must be given and no column of the input is named so "
                    f"(columns: {', '.join(self._columns)}); does the first line name the columns? "
                    f"Map one with --map COLUMN={name}"
                )
        if self._partial:
            return
        given = {*self._sources, *defaulted(self._create)}
        if _has_validators(self._create):
            given.update(self._create.model_fields)
        for name in self._facts.unmet(given):
            raise InputError(f"{self._model}.{name} must have a value and nothing gives it one")


def require_given(update: Iterable[str], plan: Plan, model: str) -> None:
    """Raise InputError unless the input gives each of the fields that are to be updated."""
    for name in update:
        if name not in plan.given:
            near = did_you_mean(name, plan.given)
            raise InputError(f"--update: the input does not give {model}.{name}{near}")


def defaulted(create: type[BaseModel]) -> list[str]:
    """Fields that the Create class itself gives a value when the input has none."""
    return [
        name
        for name, field in create.model_fields.items()
        if not field.is_required() and (field.default is not None or field.default_factory)
    ]


def _has_validators(create: type[BaseModel]) -> bool:
    """Whether the Create class has code of its own, which may fill fields that have no default."""
    own = create.__pydantic_decorators__
    return bool(own.model_validators or own.field_validators)
