"""Rows that go, or come back, along with those that they refer to: noted, locked and changed."""

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import replace

from sqlalchemy.ext.asyncio import AsyncSession

from db.catalog import TableFacts, quote
from db.change import Change
from db.matching import MatchStage
from db.merging import Given
from db.overwriting import DELETE, MATCH
from db.references import Reference

Referring = list[tuple[Reference, str]]
"""References, each with a query for the rows that refer so."""


class AlongStage(MatchStage):
    """A staging table whose rows delete or restore rows, and what goes along with these."""

    def __init__(
        self,
        session: AsyncSession,
        facts: TableFacts,
        columns: tuple[str, ...],
        given: Given,
        change: Change,
    ) -> None:
        super().__init__(session, facts, columns, given, change.journal, change.sensitive)
        self._change = change
        self._effect = change.effect
        self._dependents = change.dependents
        self._taken_along: dict[str, str] = {}
        """By table, the temporary table of the keys taken along, with the row_no for which."""
        self._places: dict[str, str] = {}
        """All of these tables that were made, also in earlier rounds."""
        self._changed_along: Counter[str] = Counter()
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
            f"JOIN {parent.name} AS t ON {same_row('t', parent, 'p')} "
            f"JOIN {child.name} AS c ON {refers(reference)} AND c.deleted_at {when} "
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
            f"SELECT c.* FROM {source} AS p "
            f"JOIN {parent.name} AS t ON {same_row('t', parent, 'p')} "
            f"JOIN {child.name} AS c ON {refers(reference)} AND c.deleted_at = p.deleted_at"
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
                    f" AND NOT EXISTS (SELECT FROM {parent.name} AS q WHERE {refers(one, 'q')} "
                    f"AND q.deleted_at IS NOT NULL{self._not_concerned(parent, 'q')})"
                )
        return "".join(others)

    def _not_concerned(self, facts: TableFacts, table: str) -> str:
        """That a row of a table is neither named nor taken along."""
        places = [self._taken_along.get(facts.table_name)]
        places.append(MATCH if facts.name == self._facts.name else None)
        return "".join(
            f" AND NOT EXISTS (SELECT FROM {place} AS k WHERE {same_row(table, facts, 'k')})"
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
                f"SELECT {key} FROM ({rows}) AS c JOIN {parent.name} AS q ON {refers(one, 'q')}"
            )
        for table, queries in named.items():
            parent = self._dependents.facts[table]
            key = ", ".join(f"t.{quote(name)}" for name in parent.primary_key)
            await self._run(
                f"SELECT FROM {parent.name} AS t WHERE ({key}) IN ({' UNION '.join(queries)}) "
                f"ORDER BY {key} FOR SHARE"
            )

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
                f"JOIN {child.name} AS c ON {same_row('c', child, 'a')}), "
                f"gone AS (UPDATE {child.name} AS t SET {values} FROM known AS n "
                f"WHERE {same_row('t', child, 'n')} "
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


def same_row(table: str, facts: TableFacts, noted: str) -> str:
    """That a row of a table is the one whose key is noted, as k0, k1 and so on."""
    return " AND ".join(f"{table}.{quote(name)} = {noted}.{k}" for name, k in _keys(facts))


def refers(reference: Reference, parent: str = "t") -> str:
    """That row c refers to the parent row."""
    pairs = zip(reference.columns, reference.targets, strict=True)
    return " AND ".join(f"c.{quote(ours)} = {parent}.{quote(theirs)}" for ours, theirs in pairs)
