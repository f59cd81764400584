"""A model of rows that name what is there and say what is to change: its key and its Update."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, create_model
from pydantic.fields import FieldInfo

from db.catalog import LIVE, TableFacts
from db.registry import Model
from jobs._errors import InputError
from jobs._mapping import Request
from jobs._nearest import did_you_mean


class _KeyAlone(BaseModel):
    """A row that says nothing but which one is meant."""

    model_config = {"extra": "forbid"}


def patch_model(model: Model, key: Sequence[str], *, with_fields: bool) -> Model:
    """The model whose rows are patches: the key, which must be given, and the Update's fields.

    Without fields it is the key alone.
    """
    fields: dict[str, Any] = {name: (_required(_field(model, name)), ...) for name in key}
    base = model.update if with_fields else _KeyAlone
    made = create_model(f"{model.table_class.__name__}Patch", __base__=base, **fields)
    return replace(model, create=made)


def _field(model: Model, name: str) -> FieldInfo:
    for of in (model.create, model.update, model.table_class):
        if (found := of.model_fields.get(name)) is not None:
            return found
    raise InputError(f"{model.name}.{name} is no field of its classes, so it can name no row")


def _required(field: FieldInfo) -> Any:
    """The field's annotation without None, with all its rules."""
    annotation: Any = field.annotation
    if get_origin(annotation) in (Union, types.UnionType):
        kept = tuple(one for one in get_args(annotation) if one is not types.NoneType)
        annotation = Union[kept]  # noqa: UP007 - of as many as there are
    for rule in field.metadata:
        annotation = Annotated[annotation, rule]
    return annotation


def choose_key(
    wanted: Sequence[str] | None,
    request: Request,
    columns: Sequence[str],
    model: Model,
    facts: TableFacts,
) -> tuple[str, ...]:
    """The columns by which the rows of an input are named.

    The primary key if the input gives it, else the one unique key that it gives. Raises InputError
    when that is none, or several, and nothing else was wanted.
    """
    keys = _unique_keys(facts)
    if wanted is not None:
        return _wanted(tuple(wanted), keys, model)
    given = _fields_given(request, columns)
    if not columns or (facts.primary_key and given.issuperset(facts.primary_key)):
        return facts.primary_key
    found = [key for key in keys if given.issuperset(key)]
    if len(found) != 1:
        named = "; ".join(", ".join(key) for key in keys)
        what = "several keys" if found else "no key"
        raise InputError(f"the input gives {what} of {model.name}; name one with --key: {named}")
    return found[0]


def _wanted(
    wanted: tuple[str, ...], keys: Sequence[tuple[str, ...]], model: Model
) -> tuple[str, ...]:
    for key in keys:
        if sorted(key) == sorted(wanted):
            return key
    named = [", ".join(key) for key in keys]
    raise InputError(
        f"--key: {', '.join(wanted)} is no unique key of {model.name}"
        f"{did_you_mean(', '.join(wanted), named)}"
    )


def _unique_keys(facts: TableFacts) -> list[tuple[str, ...]]:
    """The primary key, then the columns of the unique indexes that hold for all live rows."""
    found = [facts.primary_key] if facts.primary_key else []
    for index in facts.unique_indexes:
        names = tuple(one.name for key in index.keys if (one := facts.by_key.get(key)))
        whole = len(names) == len(index.keys) and index.predicate in (None, LIVE)
        if whole and not index.nulls_equal and names not in found:
            found.append(names)
    return found


def _fields_given(request: Request, columns: Sequence[str]) -> set[str]:
    left_out = {*request.ignore}
    mapped: Mapping[str, str] = request.map
    targets = {left if "{" in right else right for left, right in mapped.items()}
    sources = {left for left, right in mapped.items() if "{" not in right}
    return {*columns, *targets, *request.constants} - left_out - (sources - targets)
