"""Reads through the ORM see no deleted rows, unless they ask for them.

Whoever wants deleted rows too says so for a statement, for `session.get`, or for a whole session:

    await session.scalars(sa.select(Hero).execution_options(**INCLUDE_DELETED))
    await session.get(Hero, 7, execution_options=INCLUDE_DELETED)
    async with sessions(execution_options=INCLUDE_DELETED) as session: ...

What an object's relationships give is read as the object itself was.

Left alone are the statements of Core and text; UPDATE, DELETE and INSERT with all that they read,
so that they do what they say; a join made by `orm.join`, which SQLAlchemy does not look into; and
the expired columns of an object at hand, while `session.refresh` finds a deleted row no more. What
a session holds already it gives without a query, deleted or not.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import event, orm
from sqlmodel import SQLModel

from db.one_commit import LentSession

INCLUDE_DELETED: Final[Mapping[str, Any]] = MappingProxyType({"include_deleted": True})


class LiveSession(LentSession):
    """Adds to every SELECT of the ORM that its rows have to be live."""


class _Rule(orm.UserDefinedOption):
    """Stays with what was read; its payload tells whether deleted rows belong to it."""

    propagate_to_loaders = True


@event.listens_for(LiveSession, "do_orm_execute")
def _leave_out_deleted(state: orm.ORMExecuteState) -> None:
    if not (state.is_orm_statement and state.is_select):
        return
    wanted = bool(state.execution_options.get("include_deleted"))
    rule = next((one for one in state.user_defined_options if isinstance(one, _Rule)), None)
    if rule is None:
        criteria = () if wanted else _criteria()
        state.statement = state.statement.options(_Rule(wanted), *criteria)
    elif rule.payload:
        return
    if _is_refresh(state) and not wanted:
        state.statement = _of_live_row(state)


def _is_refresh(state: orm.ORMExecuteState) -> bool:
    """Whether this is `session.refresh`, and not a column that is read again since it expired."""
    refreshes = state.load_options._is_user_refresh  # noqa: SLF001 - it has no public name
    return state.is_column_load and refreshes


def _of_live_row(state: orm.ORMExecuteState) -> Any:
    """What `with_loader_criteria` would do if it concerned a refresh."""
    statement: Any = state.statement
    mapper = state.bind_mapper
    return statement.where(_is_live(mapper.class_)) if mapper and _hides(mapper) else statement


@cache
def _criteria() -> tuple[orm.LoaderCriteriaOption, ...]:
    """One for each table, since none can be made for the bases that SQLModel's tables share."""
    return tuple(
        orm.with_loader_criteria(mapper.class_, _is_live, include_aliases=True)
        for mapper in dict.fromkeys(_mappers_below(SQLModel))
        if _hides(mapper)
    )


@event.listens_for(orm.Mapper, "after_mapper_constructed")
def _know_new_table(_mapper: orm.Mapper[Any], _class: type) -> None:
    _criteria.cache_clear()


def _mappers_below(base: type[Any]) -> Iterator[orm.Mapper[Any]]:
    for one in base.__subclasses__():
        mapper = sa.inspect(one, raiseerr=False)
        if isinstance(mapper, orm.Mapper):
            yield mapper
        else:
            yield from _mappers_below(one)


def _hides(mapper: orm.Mapper[Any]) -> bool:
    return "deleted_at" in mapper.columns


def _is_live(row: Any) -> sa.ColumnElement[bool]:
    live: sa.ColumnElement[bool] = row.deleted_at.is_(None)
    return live
