"""Rows as they may be shown: read without sensitive columns, and given as Public classes."""

from datetime import datetime
from functools import cache
from typing import Any, cast

import sqlalchemy as sa
from pydantic import BaseModel, ValidationError, create_model
from sqlalchemy import orm
from sqlmodel import SQLModel

from db.columns import is_sensitive
from db.errors import ModelError
from db.live_rows import INCLUDE_DELETED
from db.reading.keys import key_of
from db.registry import Model

Query = sa.Select[SQLModel]


def select_rows(model: Model, *, deleted: bool = False) -> Query:
    """The rows of the model, of which sensitive columns stay in the database."""
    query = sa.select(model.table_class).options(*without_secrets(model.table_class))
    return query.execution_options(**INCLUDE_DELETED) if deleted else query


def without_secrets(table_class: type[SQLModel]) -> list[orm.Load]:
    """Options that keep sensitive columns from being read, here or behind a relationship."""
    mapper: orm.Mapper[Any] = sa.inspect(table_class)
    return [
        orm.Load(table_class).defer(one.class_attribute, raiseload=True)
        for one in mapper.column_attrs
        if any(isinstance(column, sa.Column) and is_sensitive(column) for column in one.columns)
    ]


def along(relationship: Any) -> orm.QueryableAttribute[Any]:
    """A relationship of a class, which the type checker takes for what a row has there."""
    return cast("orm.QueryableAttribute[Any]", relationship)


def as_public(model: Model, row: SQLModel, *, deleted: bool = False) -> BaseModel:
    """The row as its Public class has it, with `deleted_at` where deleted rows were asked for.

    Raises ModelError, which tells no value, when the class does not take what the table holds.
    """
    soft = deleted and "deleted_at" in model.table.c
    public = _with_deletion(model.public) if soft else model.public
    try:
        return public.model_validate(row, from_attributes=True)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_context=False, include_url=False)[0]
        place = ".".join(map(str, (model.name, *problem["loc"])))
        raise ModelError(
            f"The row {' '.join(map(str, key_of(row)))} does not fit {model.public.__name__}: "
            f"{place}: {problem['msg']}; mend the row or the class."
        ) from None


@cache
def _with_deletion(public: type[BaseModel]) -> type[BaseModel]:
    return create_model(public.__name__, __base__=public, deleted_at=(datetime | None, None))
