"""Which tables' rows depend on one another: what becomes of them when one is deleted or restored.

A relationship that refuses keeps the row that is referred to from being deleted while a live row
does so. One that cascades takes the referring rows along, and those that refer to them; what was
deleted along with a row, at the same instant, comes back along with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from db.catalog import TableFacts
from db.overwriting import DELETE, Effect
from db.references import Reference


@dataclass(frozen=True)
class Dependents:
    """The tables that refer to one another, from the one whose rows are deleted or restored.

    `references` are by the name of the table that is referred to, `parents` by that of the table
    that refers, `facts` by that of the table.
    """

    references: Mapping[str, Sequence[Reference]] = field(default_factory=dict)
    parents: Mapping[str, Sequence[Reference]] = field(default_factory=dict)
    facts: Mapping[str, TableFacts] = field(default_factory=dict)

    def to(self, table: str) -> Sequence[Reference]:
        return self.references.get(table, ())

    def needing(self, table: str) -> list[Reference]:
        """The references of a table whose rows do not live without the row that they refer to."""
        return [
            one
            for one in self.parents.get(table, ())
            if one.on_parent_deleted != "leave" and "deleted_at" in one.parent.c
        ]

    def cascading(self, table: str) -> list[Reference]:
        """Those whose rows are taken along; a table that keeps no deleted rows has none."""
        return [
            one
            for one in self.to(table)
            if one.on_parent_deleted == "cascade" and "deleted_at" in one.table.c
        ]

    def entangle(self, table: str, effect: Effect) -> bool:
        """Whether what goes, or comes back, along with one row may decide about another row.

        A row goes if none that stays refers to it; it comes back if all that it needs are there.
        """
        concerned = self._concerned(table)
        if effect is DELETE:
            return any(
                one.table.name in concerned
                for name in concerned
                for one in self.to(name)
                if one.on_parent_deleted == "refuse"
            )
        needed = {
            name: [one for one in self.needing(name) if one.parent.name in concerned]
            for name in concerned
        }
        return any(len(needs) > (0 if name == table else 1) for name, needs in needed.items())

    def _concerned(self, table: str) -> set[str]:
        """The table, and those whose rows are taken along."""
        found, pending = {table}, [table]
        while pending:
            names = {one.table.name for one in self.cascading(pending.pop())} - found
            found |= names
            pending += names
        return found


NO_DEPENDENTS = Dependents()
