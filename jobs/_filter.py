"""Which rows of a table are meant: conditions on its columns, joined by and.

{"team_id": 7}                  equal; null means is null
{"team_id": [7, 8, null]}       one of these
{"age": {"ge": 18, "lt": 21}}   operators: eq ne lt le gt ge in not_in like
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import sqlalchemy as sa
from pydantic import Field, TypeAdapter, ValidationError

from db.bulk import bind_processors
from db.columns import integer_range
from db.registry import Model
from jobs._errors import InputError
from jobs._nearest import did_you_mean
from jobs._problems import problems_of, said
from jobs._wording import not_storable

_NOT_STORABLE = re.compile("[\0\ud800-\udfff]")
Condition = sa.ColumnElement[bool]
MOST_VALUES = 10_000
"""PostgreSQL takes a few more in one statement; so many are better named by their keys."""


@dataclass(frozen=True)
class Filter:
    """A condition on the columns of one table."""

    condition: Condition


def parse_filter(given: Mapping[str, Any], model: Model) -> Filter:
    """Read a filter of a payload. Raises InputError with the column and the remedy."""
    _require_few(given)
    return Filter(sa.and_(*(_on_column(name, value, model) for name, value in given.items())))


def _require_few(given: Mapping[str, Any]) -> None:
    comparisons = [
        one
        for value in given.values()
        for one in (value.values() if isinstance(value, Mapping) else [value])
    ]
    values = sum(len(one) if isinstance(one, list) else 1 for one in comparisons)
    if values > MOST_VALUES:
        raise InputError(
            f"--filter: {values} values are given, and at most {MOST_VALUES} may be; name the rows "
            "by their keys, in a file"
        )


def _on_column(name: str, value: Any, model: Model) -> Condition:
    if name not in model.table.c:
        near = did_you_mean(name, model.table.c.keys())
        raise InputError(f"--filter: {model.name} has no column {name!r}{near}")
    column: sa.Column[Any] = model.table.c[name]
    read = _reader(name, model)
    if isinstance(value, Mapping):
        if not value:
            raise InputError(f"--filter {name}: names no operator; use {', '.join(_OPERATORS)}")
        return sa.and_(*(_operation(column, word, one, read) for word, one in value.items()))
    return _operation(column, "in" if isinstance(value, list) else "eq", value, read)


def _reader(name: str, model: Model) -> Callable[[Any], Any]:
    """Makes of a JSON value what the column holds."""
    annotation: Any = model.table_class.model_fields[name].annotation
    if (bounds := integer_range(model.table.c[name])) is not None:
        annotation = Annotated[annotation, Field(ge=bounds[0], le=bounds[1])]
    adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    (stored,) = bind_processors(model.table, [name])

    def read(value: Any) -> Any:
        try:
            found = adapter.validate_python(value)
        except ValidationError as error:
            secret = name in model.sensitive_columns
            why = "is not valid" if secret else said(problems_of(error)[0])
            raise InputError(f"--filter {name}: {why}") from None
        _require_storable(name, found)
        if stored is not None and found is not None:
            try:
                stored(found)
            except (ValueError, TypeError, LookupError, OverflowError) as error:
                raise InputError(f"--filter {name}: {not_storable(found, error)}") from None
        return found

    return read


def _operation(
    column: sa.Column[Any], word: str, value: Any, read: Callable[[Any], Any]
) -> Condition:
    if word not in _OPERATORS:
        near = did_you_mean(word, _OPERATORS)
        raise InputError(f"--filter {column.name}: unknown operator {word!r}{near}")
    if word in ("in", "not_in"):
        if not isinstance(value, list):
            raise InputError(f"--filter {column.name}: {word} takes a list")
        return _OPERATORS[word](column, [read(one) for one in value])
    if word == "like" and not (_is_text(column) and isinstance(value, str)):
        raise InputError(f"--filter {column.name}: like compares a column of text with a text")
    if value is None and word not in ("eq", "ne"):
        raise InputError(f"--filter {column.name}: null is neither more nor less than anything")
    if word == "like":
        _require_storable(column.name, value)
    return _OPERATORS[word](column, value if word == "like" else read(value))


def _require_storable(name: str, value: Any) -> None:
    """Raise InputError on a text that PostgreSQL cannot hold, and so cannot compare with either."""
    if isinstance(value, str) and _NOT_STORABLE.search(value):
        raise InputError(
            f"--filter {name}: the text holds a NUL or is no valid Unicode, as no row does; mend it"
        )


def _is_text(column: sa.Column[Any]) -> bool:
    kind = column.type
    kind = kind.impl_instance if isinstance(kind, sa.TypeDecorator) else kind
    return isinstance(kind, sa.String) and not isinstance(kind, sa.Enum)


def _equal(column: sa.Column[Any], value: Any) -> Condition:
    return column.is_(None) if value is None else column == value


def _one_of(column: sa.Column[Any], values: Sequence[Any]) -> Condition:
    present = [value for value in values if value is not None]
    found: Condition = column.in_(present)
    return found | column.is_(None) if len(present) < len(values) else found


def _not_equal(column: sa.Column[Any], value: Any) -> Condition:
    return column.is_distinct_from(value)


def _none_of(column: sa.Column[Any], values: Sequence[Any]) -> Condition:
    return sa.and_(sa.true(), *(_not_equal(column, value) for value in values))


_OPERATORS: Mapping[str, Callable[[sa.Column[Any], Any], Condition]] = {
    "eq": _equal,
    "ne": _not_equal,
    "lt": lambda column, value: column < value,
    "le": lambda column, value: column <= value,
    "gt": lambda column, value: column > value,
    "ge": lambda column, value: column >= value,
    "in": _one_of,
    "not_in": _none_of,
    "like": lambda column, value: column.like(value),
}
