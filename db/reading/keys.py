"""Primary keys of any kind: as a person types them, and as the place where a page ended."""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from sqlalchemy import orm
from sqlmodel import SQLModel

from db.columns import integer_range
from db.errors import BadKey
from db.registry import Model

Key = tuple[Any, ...]

_AS_TEXT = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="strings")


def key_attributes(model: Model) -> list[orm.QueryableAttribute[Any]]:
    """What makes up the primary key, in its order."""
    mapper: orm.Mapper[Any] = sa.inspect(model.table_class)
    return [mapper.get_property_by_column(one).class_attribute for one in mapper.primary_key]


def key_of(row: SQLModel) -> Key:
    """The primary key of a row that was read."""
    return tuple(sa.inspect(row).identity or ())


def parse_key(model: Model, words: Sequence[str]) -> Key:
    """The primary key whose columns were given as text. Raises BadKey."""
    names = [one.key for one in key_attributes(model)]
    if len(words) != len(names):
        raise BadKey(f"A {model.name} is named by {_count(names)}: give {' '.join(names)}.")
    try:
        given = _key_class(model).model_validate_strings(dict(zip(names, words, strict=True)))
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        raise BadKey(
            f"{' '.join(words)!r} is no key of {model.name}: {problem['loc'][0]}: {problem['msg']}."
        ) from None
    return _values(given)


def to_cursor(model: Model, key: Key) -> str:
    """The key as text for a URL or a command line, understood by `from_cursor` alone."""
    given = dict(zip(_key_class(model).model_fields, key, strict=True))
    document = _cursor_class(model)(key=given).model_dump_json()
    return urlsafe_b64encode(document.encode()).decode().rstrip("=")


def from_cursor(model: Model, cursor: str) -> Key:
    """The key behind a cursor of this model. Raises BadKey."""
    try:
        document = urlsafe_b64decode(cursor.encode() + b"=" * (-len(cursor) % 4))
        place: Any = _cursor_class(model).model_validate_json(document)
    except ValueError:
        raise BadKey(
            f"{cursor!r} is no cursor of {model.name}; give the one that the page before ended "
            "with, or none to begin."
        ) from None
    return _values(place.key)


def _values(given: BaseModel) -> Key:
    return tuple(getattr(given, name) for name in type(given).model_fields)


def _count(names: Sequence[str]) -> str:
    return "one value" if len(names) == 1 else f"{len(names)} values"


@cache
def _cursor_class(model: Model) -> type[BaseModel]:
    fields: dict[str, Any] = {"of": (Literal[model.name], model.name), "key": _key_class(model)}
    return create_model("cursor", **fields)


@cache
def _key_class(model: Model) -> type[BaseModel]:
    """The columns of the key as fields."""
    fields: dict[str, Any] = {one.key: _field(model, one) for one in key_attributes(model)}
    return create_model(f"{model.name} key", __config__=_AS_TEXT, **fields)


def _field(model: Model, attribute: orm.QueryableAttribute[Any]) -> Any:
    bounds = integer_range(attribute)
    if bounds is None:
        return model.table_class.model_fields[attribute.key].annotation
    return Annotated[int, Field(ge=bounds[0], le=bounds[1])]
