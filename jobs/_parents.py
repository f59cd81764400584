"""The rows of other tables that an input names by natural key: found, and created when missing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db import bulk
from db.catalog import TableFacts, read_facts
from db.errors import UnknownModel
from db.ledger.audit import Entry, Keys
from db.ledger.chunk import Span
from db.outcome import Inserted
from db.refusal import Refusal
from db.registry import Model
from db.staging import ROW_NO, STAGE
from jobs._errors import InputError
from jobs._mapping import Plan
from jobs._part import Part
from jobs._preparation import Preparer
from jobs._references import Known, Reference, natural_key
from jobs._run import ChunkedRun
from jobs._spelling import spelling


class Stale(Exception):
    """A row that was looked up by its natural key is no longer what it was."""


@dataclass(frozen=True)
class Parent:
    """The table that a reference leads to, and the column that names its rows."""

    model: Model
    facts: TableFacts
    key: sa.Column[Any]

    @cached_property
    def preparer(self) -> Preparer:
        """Makes rows of nothing but their natural key."""
        name = self.key.name
        plan = Plan(((name, 0),), (), {}, (), (), {name: name})
        return Preparer(self.model, plan, self.facts)

    @cached_property
    def _spell(self) -> Callable[[str], Any]:
        return spelling(self.model.create, self.key.name)

    @cached_property
    def _convert(self) -> Callable[[Any], Any] | None:
        return bulk.bind_processors(self.key.table, [self.key.name])[0]

    def texts(self, key: str) -> Sequence[str]:
        """What a key may be in the table: as the Create class spells it, else as it stands."""
        spelt = self._spell(key)
        if self._convert is None and spelt == key:
            return (key,)
        stored = map(self._stored, (spelt, key))
        return [text for text in dict.fromkeys(stored) if text is not None]

    def _stored(self, key: Any) -> str | None:
        try:
            text = key if self._convert is None else self._convert(key)
        except (ValueError, TypeError, LookupError):
            return None  # no row can have it
        return text if isinstance(text, str) else None

    def naming(self, texts: Sequence[str], target: str) -> sa.Select[Any]:
        """Which texts, numbered from 1, name a live row to PostgreSQL, and the row's target.

        OFFSET 0 makes it a look-up for each text, whatever the planner believes of the table.
        """
        table = self.key.table
        # one parameter however many; compared as the column is, though not cut to its length
        these = sa.bindparam(None, texts, sa.ARRAY(sa.Text))
        array = these.op("::")(sa.literal_column(f"{self.facts.types[self.key.name]}[]"))
        given = sa.func.unnest(array).table_valued("text", with_ordinality="number")
        given = given.render_derived("given")
        row = sa.select(table.c[target].label("target")).where(self.key == given.c.text)
        if "deleted_at" in table.c:
            row = row.where(table.c.deleted_at.is_(None))
        met = row.offset(sa.literal_column("0")).lateral("met")
        return sa.select(given.c.number, met.c.target).join_from(given, met, sa.true())

    def require_creatable(self, reference: Reference) -> None:
        """Raise InputError when a row needs more than its natural key, or does not take it."""
        if self.key.name not in self.model.create.model_fields:
            raise InputError(
                f"{reference.column}: a {reference.table} cannot be created from its "
                f"{reference.key}, which is no field of {self.model.create.__name__}; import the "
                f"{reference.table} rows first, or reject or null what is missing"
            )
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
        """The ids of live rows by natural key, for each referencing field.

        A key names the row that its Create class would have made of it: two may name the same.
        """
        known = {}
        for reference, keys in wanted.items():
            texts = self.parents[reference].texts
            known[reference.field] = await self._ids(
                session, reference, {key: texts(key) for key in keys}
            )
        return known

    async def _ids(
        self, session: AsyncSession, reference: Reference, keys: Mapping[str, Sequence[str]]
    ) -> dict[str, Any]:
        """The ids of live rows by key, each by the first of its texts that names one."""
        texts = sorted(set(chain.from_iterable(keys.values())))
        query = self.parents[reference].naming(texts, reference.target)
        found = {texts[row[0] - 1]: row[1] for row in await session.execute(query)}
        ids = {}
        for key, several in keys.items():
            there = next(filter(found.__contains__, several), None)
            if there is not None:
                ids[key] = found[there]
        return ids

    async def create(
        self, session: AsyncSession, missing: Mapping[Reference, set[str]], created: Created
    ) -> Known:
        """Create the rows that have these keys, and return the ids of all that are there then.

        A key that is not valid, or that PostgreSQL refuses, has its refusal in place of an id. One
        that a trigger replaced by another is missing still: the next chunk would not find the row
        by it either.
        """
        known = {}
        for reference, keys in missing.items():
            parent = self.parents[reference]
            names, preparer = sorted(keys), parent.preparer
            prepared = preparer.prepare(_part(names), {})
            done = await bulk.insert_rows(
                session, parent.facts, preparer.columns, prepared.batch, "skip"
            )
            new = await _written(session, parent, reference.target, done)
            created.ids.setdefault(reference, []).extend(new)
            at = preparer.columns.index(parent.key.name)
            made = zip(prepared.positions, prepared.records, strict=True)
            keyed = [(names[position], record[at]) for position, record in made]
            texts = {name: [text] for name, text in keyed if isinstance(text, str)}
            refused = prepared.refused | {
                prepared.positions[index]: why for index, why in done.refused.items()
            }
            known[reference.field] = {
                **{names[at]: not_creatable(reference, why) for at, why in refused.items()},
                **await self._ids(session, reference, texts),
            }
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
                these = sa.bindparam(None, gone, sa.ARRAY(target.type))
                await session.execute(sa.delete(target.table).where(target == sa.any_(these)))
            if kept:
                keys = Keys(keys=[(one,) for one in kept])
                entries.append(Entry("insert", reference.table, len(kept), keys))
        return entries


def not_creatable(reference: Reference, why: Refusal) -> Refusal:
    """Why a row that names a missing one is refused where that one cannot be created."""
    text = f"{reference.column}: no {reference.table} can be created, for {why.message}"
    return Refusal("missing_reference", text, reference.column)


def _part(names: list[str]) -> Part:
    count = len(names)
    texts = [name.encode() for name in names]
    return Part(1, Span(1, count, 0, 0, 1, 1), [[name] for name in names], range(count), texts, {})


async def _written(
    session: AsyncSession, parent: Parent, target: str, done: Inserted
) -> Sequence[Any]:
    """The ids of the rows that were just inserted, whatever a trigger has made of them."""
    table, keys = parent.model.table, parent.facts.primary_key
    stage = sa.table(STAGE, sa.column(ROW_NO), *map(sa.column, keys))
    mine = sa.bindparam(None, sorted(done.inserted), sa.ARRAY(sa.Integer))
    query = sa.select(table.c[target]).where(
        stage.c[ROW_NO] == sa.any_(mine), *(table.c[key] == stage.c[key] for key in keys)
    )
    return (await session.scalars(query)).all() if done.inserted else []


async def _find(run: ChunkedRun, reference: Reference) -> Parent:
    try:
        model = run.models.get(reference.table)
    except UnknownModel as error:
        raise InputError(str(error)) from None
    facts = await run.read(lambda session: read_facts(session, model.table))
    return Parent(model, facts, natural_key(model.table, facts, reference.key))
