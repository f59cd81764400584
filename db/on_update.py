"""What a model writes into columns whenever a row is updated, its `onupdate`, as SQL."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import CompileError

from db.errors import ModelError

_WHAT_MODELS_RAISE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
# SQLAlchemy leaves the constructors of its dialects without types
_DIALECT = postgresql.asyncpg.dialect()  # type: ignore[no-untyped-call]  # no types there in SQLAlchemy


def on_update(table: sa.Table) -> Mapping[str, Callable[[], str]]:
    """By column, what gives the SQL over unqualified column names; functions are called anew.

    What it gives raises ModelError where a value cannot be had or written as SQL.
    """
    return {
        column.name: partial(_sql, column, column.onupdate)
        for column in table.columns
        if column.onupdate is not None
    }


def _sql(column: sa.Column[Any], default: Any) -> str:
    try:
        if default.is_sequence:
            return _compiled(default.next_value())
        if default.is_clause_element:
            return f"({_compiled(default.arg)})"
        return _literal(column, default.arg(None) if default.is_callable else default.arg)
    except CompileError as error:
        raise _unusable(column, f"cannot be written as SQL: {error}") from error
    except _WHAT_MODELS_RAISE as error:
        why = f"cannot be evaluated for many rows at once ({type(error).__name__}: {error})"
        raise _unusable(column, why) from error


def _literal(column: sa.Column[Any], value: Any) -> str:
    """A value as the column takes it; of JSON SQLAlchemy writes no literals."""
    if isinstance(column.type, sa.JSON):
        to_text: Any = column.type.dialect_impl(_DIALECT).bind_processor(_DIALECT)
        return _compiled(sa.literal(to_text(value), sa.Text()))
    return _compiled(sa.literal(value, column.type))


def _compiled(clause: Any) -> str:
    """Without the table's name, for the statement has another; a query in it needs those."""
    queries = any(isinstance(one, sa.SelectBase) for one in sa.sql.visitors.iterate(clause))
    options = {"literal_binds": True, "include_table": queries}
    return str(clause.compile(dialect=_DIALECT, compile_kwargs=options))


def _unusable(column: sa.Column[Any], why: str) -> ModelError:
    return ModelError(
        f"The onupdate of {column.table.name}.{column.name} {why}; give it an SQL expression, a "
        "value, or a function that needs no context and gives a value of the column's type."
    )
