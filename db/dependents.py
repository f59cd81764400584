"""Rows that refer to rows which are deleted softly, or restored: refused for, taken along, or left.

A relationship that refuses keeps the row that is referred to from being deleted while a live row
does so. One that cascades takes the referring rows along, and those that refer to them; what was
deleted along with a row, at the same instant, comes back along with it.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from db.catalog import TableFacts, UniqueIndex, quote
from db.matching import MatchStage
from db.overwriting import DELETE, MATCH, Effect
from db.references import Reference
from db.refusal import Refusal

Referring = list[tuple[Reference, str]]
"""References, each with a query for the rows that refer so."""
REFERENCED = "still_referenced"
PARENT_DELETED = "parent_deleted"


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


class DependentStage(MatchStage):
    """A staging table whose rows delete or restore rows, and what depends on these."""

    _dependents: Dependents
    _effect: Effect
    _taken_along: dict[str, str]
    """By table, the temporary table of the keys that are taken along, with the row_no for which."""
    _places: dict[str, str]
    """All of these tables that were made, also in earlier rounds."""
    _changed_along: Counter[str]
    """By table, how many rows were."""

    async def _gather(self) -> None:
        """Note and lock what is to be taken along, until there is nothing more.

        What comes back may wait for another row that comes back, so it is looked for again.
        """
        self._taken_along = {}
        while await self._gather_levels() and self._effect is not DELETE:
            pass

    async def _gather_levels(self) -> bool:
        """Go from table to table; whether there was anything new."""
        found = False
        levels = [(self._facts.table_name, MATCH, self._facts)]
        while levels:
            parent, source, facts = levels.pop(0)
            for one in self._dependents.cascading(parent):
                child = self._dependents.facts[one.table.name]
                if await self._gather_by(one, source, facts, child):
                    found = True
                    levels.append((one.table.name, self._taken_along[one.table.name], child))
        return found

    async def _gather_by(
        self, reference: Reference, source: str, parent: TableFacts, child: TableFacts
    ) -> bool:
        """Note what refers so to the rows of a source; whether there is anything new."""
        place = await self._place_for(child)
        if self._effect is not DELETE:
            await self._hold_referred(self._others(reference, source, parent, child))
        keys = _keys(child)
        key = ", ".join(f"c.{quote(name)} AS {k}" for name, k in keys)
        when = "IS NULL" if self._effect is DELETE else "= p.deleted_at"
        alive = "p.deleted_at IS NULL" if self._effect is DELETE else "p.deleted_at IS NOT NULL"
        known = " AND ".join(f"k.{k} = h.{k}" for _, k in keys)
        new = await self._run(
            f"WITH h AS MATERIALIZED (SELECT p.row_no, c.deleted_at, {key} FROM {source} AS p "
            f"JOIN {parent.name} AS t ON {_same('t', parent, 'p')} "
            f"JOIN {child.name} AS c ON {_refers(reference)} AND c.deleted_at {when} "
            f"WHERE {alive}{self._without_orphans(reference)} "
            f"ORDER BY {', '.join(k for _, k in keys)} FOR NO KEY UPDATE OF c) "
            f"INSERT INTO {place} SELECT DISTINCT * FROM h "
            f"WHERE NOT EXISTS (SELECT FROM {place} AS k WHERE k.row_no = h.row_no AND {known})"
            f"{self._not_named_itself(child, 'h')}"
        )
        return bool(new.rowcount)

    def _others(
        self, reference: Reference, source: str, parent: TableFacts, child: TableFacts
    ) -> Referring:
        """What else the rows refer to that may come back along with those of a source."""
        along = (
            f"SELECT c.* FROM {source} AS p JOIN {parent.name} AS t ON {_same('t', parent, 'p')} "
            f"JOIN {child.name} AS c ON {_refers(reference)} AND c.deleted_at = p.deleted_at"
        )
        needed = self._dependents.needing(reference.table.name)
        return [(one, along) for one in needed if one.columns != reference.columns]

    def _without_orphans(self, reference: Reference) -> str:
        """Rows that refer to another deleted row, too, do not come back along with this one."""
        if self._effect is DELETE:
            return ""
        others = []
        for one in self._dependents.needing(reference.table.name):
            if one.columns != reference.columns:
                parent = self._dependents.facts[one.parent.name]
                others.append(
                    f" AND NOT EXISTS (SELECT FROM {parent.name} AS q WHERE {_refers(one, 'q')} "
                    f"AND q.deleted_at IS NOT NULL{self._not_concerned(parent, 'q')})"
                )
        return "".join(others)

    def _not_concerned(self, facts: TableFacts, table: str) -> str:
        """That a row of a table is neither named nor taken along."""
        places = [self._taken_along.get(facts.table_name)]
        places.append(MATCH if facts.name == self._facts.name else None)
        return "".join(
            f" AND NOT EXISTS (SELECT FROM {place} AS k WHERE {_same(table, facts, 'k')})"
            for place in places
            if place is not None
        )

    def _not_named_itself(self, child: TableFacts, table: str) -> str:
        """Rows that the input names are deleted or restored for themselves."""
        if child.name != self._facts.name:
            return ""
        same = " AND ".join(f"m.{k} = {table}.{k}" for _, k in _keys(child))
        return f" AND NOT EXISTS (SELECT FROM {MATCH} AS m WHERE {same})"

    async def _place_for(self, child: TableFacts) -> str:
        """The temporary table for the keys of a table, empty when a round first asks for it.

        It is made once: until the transaction ends, each that was made keeps a lock.
        """
        name = child.table_name
        if name not in self._taken_along:
            if name in self._places:
                await self._run(f"TRUNCATE {self._places[name]}")
            else:
                self._places[name] = await self._make_place(child, len(self._places))
            self._taken_along[name] = self._places[name]
        return self._taken_along[name]

    async def _make_place(self, child: TableFacts, number: int) -> str:
        place = f"bulwark_along_{number}"
        keys = ", ".join(f"{quote(name)} AS {k}" for name, k in _keys(child))
        await self._run(f"DROP TABLE IF EXISTS pg_temp.{place}")
        await self._run(
            f"CREATE TEMPORARY TABLE {place} ON COMMIT DROP AS SELECT 0 AS row_no, "
            f"deleted_at, {keys} FROM {child.name} WITH NO DATA"
        )
        return place

    async def _refuse_referenced(self) -> None:
        """Refuse the rows that live rows refer to where that is not allowed."""
        sources = [(self._facts, MATCH)]
        sources += [(self._dependents.facts[name], at) for name, at in self._taken_along.items()]
        for parent, source in sources:
            cascading = self._dependents.cascading(parent.table_name)
            for one in self._dependents.to(parent.table_name):
                if one.on_parent_deleted != "leave" and one not in cascading:
                    await self._refuse_by(one, source, parent)

    async def _refuse_by(self, reference: Reference, source: str, parent: TableFacts) -> None:
        child = self._dependents.facts[reference.table.name]
        alive = " AND c.deleted_at IS NULL" if "deleted_at" in reference.table.c else ""
        alive += self._not_concerned(child, "c")
        shown = ", ".join(f"c.{quote(name)}::text" for name in child.primary_key)
        found = await self._run(
            f"SELECT DISTINCT ON (p.row_no) p.row_no, concat_ws(', ', {shown}) "
            f"FROM {source} AS p JOIN {parent.name} AS t ON {_same('t', parent, 'p')} "
            f"JOIN {child.name} AS c ON {_refers(reference)}{alive} "
            f"WHERE p.deleted_at IS NULL ORDER BY p.row_no, {shown}"
        )
        keys = ", ".join(child.primary_key)
        for row in found:
            number, key = tuple(row)
            text = f"{reference.name} still refers to it, as {keys} {key} does"
            self._refuse_row(number, Refusal(REFERENCED, text, reference.name))

    def _refuse_row(self, number: int, refusal: Refusal) -> None:
        if number in self._loaded:
            self._refused[number] = refusal
            self._loaded.discard(number)

    async def _hold_parents(self) -> None:
        """Keep the rows that deleted rows refer to as they are, until all of it is committed.

        Somebody might delete one at the same time, who cannot see yet that a row comes back to it.
        What may come back along refers to some of them: locked later, they would be out of order.
        """
        deleted = (
            f"SELECT c.* FROM {MATCH} AS m JOIN {self._facts.name} AS c "
            f"ON {self._sql.same_row_as_met('c', 'm')} WHERE m.deleted_at IS NOT NULL"
        )
        referring = [(one, deleted) for one in self._dependents.needing(self._facts.table_name)]
        for one in self._dependents.cascading(self._facts.table_name):
            child = self._dependents.facts[one.table.name]
            referring += self._others(one, MATCH, self._facts, child)
        await self._hold_referred(referring)

    async def _hold_referred(self, referring: Referring) -> None:
        """Lock what the rows of queries refer to so: of each table all at once, by their keys."""
        named: dict[str, list[str]] = defaultdict(list)
        for one, rows in referring:
            parent = self._dependents.facts[one.parent.name]
            key = ", ".join(f"q.{quote(name)}" for name in parent.primary_key)
            named[one.parent.name].append(
                f"SELECT {key} FROM ({rows}) AS c JOIN {parent.name} AS q ON {_refers(one, 'q')}"
            )
        for table, queries in named.items():
            parent = self._dependents.facts[table]
            key = ", ".join(f"t.{quote(name)}" for name in parent.primary_key)
            await self._run(
                f"SELECT FROM {parent.name} AS t WHERE ({key}) IN ({' UNION '.join(queries)}) "
                f"ORDER BY {key} FOR SHARE"
            )

    async def _refuse_orphans(self) -> None:
        """Refuse rows that would come back without the live row that they refer to."""
        for one in self._dependents.needing(self._facts.table_name):
            parent = self._dependents.facts[one.parent.name]
            found = await self._run(
                f"SELECT m.row_no FROM {MATCH} AS m JOIN {self._facts.name} AS c "
                f"ON {self._sql.same_row_as_met('c', 'm')} "
                f"JOIN {parent.name} AS t ON {_refers(one)} WHERE m.deleted_at IS NOT NULL "
                f"AND t.deleted_at IS NOT NULL{self._not_concerned(parent, 't')}"
            )
            text = f"{one.name} refers to a {one.parent.name} that is deleted; restore that first"
            for number in found.scalars():
                self._refuse_row(number, Refusal(PARENT_DELETED, text, ", ".join(one.columns)))

    async def _refuse_taken_values(self) -> None:
        """Refuse rows that would bring back along what another live row has taken meanwhile."""
        for name, along in self._taken_along.items():
            child = self._dependents.facts[name]
            for index in child.unique_indexes:
                if index.predicate is not None and child.by_key.keys() >= set(index.keys):
                    await self._refuse_taken_value(child, along, index)

    async def _refuse_taken_value(self, child: TableFacts, along: str, index: UniqueIndex) -> None:
        equal = "IS NOT DISTINCT FROM" if index.nulls_equal else "="
        same = " AND ".join(f"o.{key} {equal} c.{key}" for key in index.keys)
        ours, theirs = (
            f"concat_ws(', ', {', '.join(f'{at}.{quote(one)}::text' for one in child.primary_key)})"
            for at in ("c", "o")
        )
        found = await self._run(
            f"SELECT k.row_no, {ours}, {theirs} FROM {along} AS k "
            f"JOIN {child.name} AS c ON {_same('c', child, 'k')} "
            f"JOIN {child.name} AS o ON {same} AND o.deleted_at IS NULL"
        )
        keys, own = ", ".join(index.keys), ", ".join(child.primary_key)
        for row in found:
            number, mine, other = tuple(row)
            text = (
                f"{child.table_name} {own} {mine}, which was deleted along with it, has the {keys} "
                f"that {own} {other} has by now ({index.name})"
            )
            self._refuse_row(number, Refusal("unique_violation", text, keys))

    async def _take_along(self, changed: Collection[int]) -> None:
        """Delete or restore what depends on the rows that were changed, and write it down."""
        for name, along in self._taken_along.items():
            child = self._dependents.facts[name]
            written = {"deleted_at": self._effect.deleted_at or "NULL"}
            written |= {one: sql() for one, sql in child.on_update.items()}
            values = ", ".join(f"{quote(one)} = {sql}" for one, sql in written.items())
            keys = [k for _, k in _keys(child)]
            version = "c.version" if "version" in child.types else "CAST(NULL AS bigint)"
            came = f"SELECT * FROM {along} WHERE row_no = ANY(:changed)"
            first = self._journal.first_entry + self._count + self._changed_along.total()
            journal = replace(self._journal, table_name=name, first_entry=first)
            noted, binds = journal.sql("changed", self._effect.action)
            told = await self._run(
                f"WITH known AS (SELECT DISTINCT ON ({', '.join(keys)}) {', '.join(keys)}, "
                f"c.deleted_at AS was_deleted_at, {version} AS was_version FROM ({came}) AS a "
                f"JOIN {child.name} AS c ON {_same('c', child, 'a')}), "
                f"gone AS (UPDATE {child.name} AS t SET {values} FROM known AS n "
                f"WHERE {_same('t', child, 'n')} "
                f"RETURNING jsonb_build_array({', '.join(f'n.{k}' for k in keys)}) AS key, "
                "jsonb_build_object('deleted_at', n.was_deleted_at) AS before, "
                "CAST(NULL AS jsonb) AS before_sensitive, n.was_version AS version), "
                "changed AS (SELECT row_number() OVER () AS row_no, * FROM gone), "
                f"noted AS ({noted}) SELECT count(*) FROM changed",
                changed=list(changed),
                **binds,
            )
            self._changed_along[name] += told.scalar_one()


def _keys(facts: TableFacts) -> list[tuple[str, str]]:
    """The columns of the primary key, and what they are called where keys are noted."""
    return [(name, f"k{n}") for n, name in enumerate(facts.primary_key)]


def _same(table: str, facts: TableFacts, noted: str) -> str:
    return " AND ".join(f"{table}.{quote(name)} = {noted}.{k}" for name, k in _keys(facts))


def _refers(reference: Reference, parent: str = "t") -> str:
    """That row c refers to the parent row."""
    pairs = zip(reference.columns, reference.targets, strict=True)
    return " AND ".join(f"c.{quote(ours)} = {parent}.{quote(theirs)}" for ours, theirs in pairs)
