"""One row with what belongs to it: the rows that it refers to, and those that refer to it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

from db.ledger.row_history import RowHistory, read_row_history
from db.reading.keys import Key, key_attributes
from db.reading.public import Query, as_public, select_rows, without_secrets
from db.registry import Model, Registry

Relation = orm.RelationshipProperty[Any]


@dataclass(frozen=True)
class Related:
    """A row with the rows that it refers to, by the name of the relationship."""

    row: BaseModel
    parents: Mapping[str, BaseModel | None]


@dataclass(frozen=True)
class Children:
    """The newest rows that refer to one by a relationship, and whether there are others."""

    rows: tuple[Related, ...]
    more: bool


@dataclass(frozen=True)
class RowView:
    """A row, all that its model has relationships to, and what the audit tells of it."""

    itself: Related
    children: Mapping[str, Children]
    history: RowHistory


async def read_row(
    session: AsyncSession,
    models: Registry,
    model: Model,
    key: Key,
    *,
    most: int = 20,
    deleted: bool = False,
) -> RowView | None:
    """The row of this key, `most` rows of each of its relationships, and its newest audit lines.

    It takes a statement for the row, one for each relationship to many, and two for the audit,
    however many rows there are.
    """
    reader = _Reader(session, models, most, deleted=deleted)
    return await reader.view(model, key)


class _Reader:
    def __init__(
        self, session: AsyncSession, models: Registry, most: int, *, deleted: bool
    ) -> None:
        self._session = session
        self._models = {one.table_class: one for one in models.values()}
        self._most = most
        self._deleted = deleted

    async def view(self, model: Model, key: Key) -> RowView | None:
        named = zip(key_attributes(model), key, strict=True)
        query = self._select(model).where(*(attribute == value for attribute, value in named))
        row = (await self._session.scalars(query)).one_or_none()
        if row is None:
            return None
        children = {
            one.key: await self._children(row, one) for one in self._relations(model) if one.uselist
        }
        history = await read_row_history(self._session, model.table, key, most=self._most)
        return RowView(self._related(model, row), children, history)

    async def _children(self, row: SQLModel, relation: Relation) -> Children:
        child = self._models[relation.mapper.class_]
        newest_first = [one.desc() for one in key_attributes(child)]
        query = self._select(child).where(orm.with_parent(row, relation.class_attribute))
        found = await self._session.scalars(query.order_by(*newest_first).limit(self._most + 1))
        rows = found.all()
        shown = tuple(self._related(child, one) for one in rows[: self._most])
        return Children(shown, len(rows) > self._most)

    def _select(self, model: Model) -> Query:
        """The model's rows together with those that they refer to."""
        query = select_rows(model, deleted=self._deleted)
        for one in self._parents(model):
            secrets = without_secrets(one.mapper.class_)
            query = query.options(orm.joinedload(one.class_attribute).options(*secrets))
        return query

    def _related(self, model: Model, row: SQLModel) -> Related:
        parents = {one.key: self._parent(row, one) for one in self._parents(model)}
        return Related(as_public(model, row, deleted=self._deleted), parents)

    def _parent(self, row: SQLModel, relation: Relation) -> BaseModel | None:
        parent = getattr(row, relation.key)
        if parent is None:
            return None
        return as_public(self._models[relation.mapper.class_], parent, deleted=self._deleted)

    def _parents(self, model: Model) -> Iterator[Relation]:
        return (one for one in self._relations(model) if not one.uselist)

    def _relations(self, model: Model) -> Iterator[Relation]:
        """The relationships to models that are registered; of others nobody knows what to hide."""
        mapper: orm.Mapper[Any] = sa.inspect(model.table_class)
        return (one for one in mapper.relationships if one.mapper.class_ in self._models)
