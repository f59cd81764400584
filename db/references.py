"""Which tables refer to which: the foreign keys of the models, seen from the row referred to."""

from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa

from db.columns import OnParentDeleted


@dataclass(frozen=True)
class Reference:
    """A foreign key: a row of `table` names by `columns` a row of `parent`, in its `targets`."""

    table: sa.Table
    columns: tuple[str, ...]
    parent: sa.Table
    targets: tuple[str, ...]
    on_parent_deleted: OnParentDeleted

    @property
    def name(self) -> str:
        """As a person names it: membership.hero_id."""
        return f"{self.table.name}.{'+'.join(self.columns)}"


def references_to(parent: sa.Table, tables: Iterable[sa.Table]) -> list[Reference]:
    """The foreign keys of the tables that lead to this one, by table and column.

    One whose column says nothing else refuses that its parent is deleted.
    """
    found = [
        _reference(key)
        for table in tables
        for key in table.foreign_key_constraints
        if key.referred_table is parent
    ]
    return sorted(found, key=lambda one: one.name)


def references_from(child: sa.Table) -> list[Reference]:
    """The foreign keys of the table, by column."""
    return sorted(map(_reference, child.foreign_key_constraints), key=lambda one: one.name)


def _reference(key: sa.ForeignKeyConstraint) -> Reference:
    assert isinstance(key.table, sa.Table)
    elements = key.elements
    policies = [one.parent.info.get("on_parent_deleted") for one in elements]
    return Reference(
        key.table,
        tuple(one.parent.name for one in elements),
        key.referred_table,
        tuple(one.column.name for one in elements),
        next(filter(None, policies), "refuse"),
    )


def children_first(tables: Iterable[sa.Table]) -> list[sa.Table]:
    """The tables in an order in which each stands before those that it refers to.

    Tables that refer to each other in a circle come in any order among themselves.
    """
    return list(reversed(sa.schema.sort_tables(list(tables))))
