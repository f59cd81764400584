"""Refusing rows that other rows keep from being deleted, or from being restored."""

from db.catalog import TableFacts, UniqueIndex, quote
from db.overwriting import DELETE, MATCH
from db.references import Reference
from db.refusal import Refusal
from db.taking_along import AlongStage, refers, same_row

REFERENCED = "still_referenced"
PARENT_DELETED = "parent_deleted"


class DependentStage(AlongStage):
    """A staging table whose rows delete or restore rows, unless other rows forbid it."""

    async def _judge_dependents(self) -> None:
        """Refuse the rows that may not go, or come back, because of others."""
        await self._gather()
        if self._effect is DELETE:
            await self._refuse_referenced()
        else:
            await self._refuse_orphans()
            await self._refuse_taken_values()
        await self._hold(self._refused.keys())

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
            f"FROM {source} AS p JOIN {parent.name} AS t ON {same_row('t', parent, 'p')} "
            f"JOIN {child.name} AS c ON {refers(reference)}{alive} "
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

    async def _refuse_orphans(self) -> None:
        """Refuse rows that would come back without the live row that they refer to."""
        for one in self._dependents.needing(self._facts.table_name):
            parent = self._dependents.facts[one.parent.name]
            found = await self._run(
                f"SELECT m.row_no FROM {MATCH} AS m JOIN {self._facts.name} AS c "
                f"ON {self._sql.same_row_as_met('c', 'm')} "
                f"JOIN {parent.name} AS t ON {refers(one)} WHERE m.deleted_at IS NOT NULL "
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
            f"JOIN {child.name} AS c ON {same_row('c', child, 'k')} "
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
