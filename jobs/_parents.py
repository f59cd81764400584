"""The rows of other tables that an input names by natural key: found, and created when missing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db import bulk
from db.catalog import TableFacts, read_facts
from db.errors import UnknownModel
from db.ledger.audit import Entry, Keys
from db.ledger.chunk import Span
from db.registry import Model
from jobs._errors import InputError
from jobs._mapping import Plan, Reference, natural_key
from jobs._part import Part
from jobs._preparation import Known, Preparer
from jobs._run import ChunkedRun


@dataclass(frozen=True)
class Parent:
    """The table that a reference leads to, and the column that names its rows."""

    model: Model
    facts: TableFacts
    key: sa.Column[Any]

    @property
    def preparer(self) -> Preparer:
        """Makes rows of nothing but their natural key."""
        name = self.key.name
        plan = Plan(((name, 0),), (), {}, (), (), {name: name})
        return Preparer(self.model, plan, self.facts)

    def require_creatable(self, reference: Reference) -> None:
        """Raise InputError when a row needs more than its natural key."""
        needed = {
            name
            for name, one in self.model.create.model_fields.items()
            if one.is_required() and name != self.key.name
        }
        needed |= set(self.facts.unmet({self.key.name, *self.model.create.model_fields}))
        if needed:
            raise InputError(
                f"{reference.column}: a {reference.table} cannot be created from its "
                f"{reference.key} alone, for it needs {', '.join(sorted(needed))}; import the "
                f"{reference.table} rows first, or reject or null what is missing"
            )


@dataclass
class Created:
    """What one transaction has created, by reference: the ids of the new rows."""

    ids: dict[Reference, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Parents:
    """All that the references of one plan lead to."""

    child: TableFacts
    parents: Mapping[Reference, Parent]

    @classmethod
    async def find(
        cls, run: ChunkedRun, child: TableFacts, plan: Plan, *, creatable: bool
    ) -> "Parents":
        """Raise InputError when a reference names rows by a column that cannot.

        So it does when missing rows are to be created and need more than their natural key.
        """
        found = cls(child, {one: await _find(run, one) for one in plan.references})
        for reference, parent in found.parents.items():
            if creatable:
                parent.require_creatable(reference)
        return found

    async def ids(self, session: AsyncSession, wanted: Mapping[Reference, set[str]]) -> Known:
        """The ids of live rows by natural key, for each referencing field."""
        return {one.field: await self._ids(session, one, keys) for one, keys in wanted.items()}

    async def _ids(
        self, session: AsyncSession, reference: Reference, keys: set[str]
    ) -> dict[str, Any]:
        column = self.parents[reference].key
        identity = column.table.c[reference.target]
        [convert] = bulk.bind_processors(column.table, [column.name])
        texts = sorted(map(convert, keys) if convert else keys)
        # one parameter however many keys; not of the column's length, to which a cast cuts
        these = sa.bindparam(None, texts, sa.ARRAY(sa.Text))
        query = sa.select(column, identity).where(column == sa.any_(these))
        if "deleted_at" in column.table.c:
            query = query.where(column.table.c.deleted_at.is_(None))
        return {row[0]: row[1] for row in await session.execute(query)}

    async def create(
        self, session: AsyncSession, missing: Mapping[Reference, set[str]], created: Created
    ) -> Known:
        """Create the rows that have these keys, and return the ids of all that are there then.

        A key that is not valid, or that PostgreSQL refuses, is missing still.
        """
        known = {}
        for reference, keys in missing.items():
            parent = self.parents[reference]
            names = sorted(keys)
            prepared = parent.preparer.prepare(_part(names), {})
            done = await bulk.insert_rows(
                session, parent.facts, parent.preparer.columns, prepared.batch, "skip"
            )
            ids = await self._ids(session, reference, keys)
            mine = [names[prepared.positions[at]] for at in sorted(done.inserted)]
            created.ids.setdefault(reference, []).extend(ids[name] for name in mine)
            known[reference.field] = ids
        return known

    async def keep_used(
        self, session: AsyncSession, created: Created, used: Mapping[Reference, set[Any]]
    ) -> list[Entry]:
        """Take back what no row that took effect names; return the audit of what stays.

        Nobody else can know of the rows yet.
        """
        entries = []
        for reference, ids in created.ids.items():
            alike = [one for one in self.parents if one.table == reference.table]
            needed = set[Any]().union(*(used.get(one, set()) for one in alike))
            kept = sorted(set(ids) & needed)
            target = self.parents[reference].model.table.c[reference.target]
            gone = [one for one in ids if one not in needed]
            if gone:
                await session.execute(sa.delete(target.table).where(target.in_(gone)))
            if kept:
                keys = Keys(keys=[(one,) for one in kept])
                entries.append(Entry("insert", reference.table, len(kept), keys))
        return entries


def _part(names: list[str]) -> Part:
    count = len(names)
    texts = [name.encode() for name in names]
    return Part(1, Span(1, count, 0, 0, 1, 1), [[name] for name in names], range(count), texts, {})


async def _find(run: ChunkedRun, reference: Reference) -> Parent:
    try:
        model = run.models.get(reference.table)
    except UnknownModel as error:
        raise InputError(str(error)) from None
    facts = await run.read(lambda session: read_facts(session, model.table))
    return Parent(model, facts, natural_key(model.table, facts, reference.key))
