"""Which rows of a change take effect at once: those of which none matters to another."""

from typing import Any

from db.catalog import LIVE, UniqueIndex, quote
from db.dependent_refusals import DependentStage
from db.matching import in_turn
from db.overwriting import DELETE, GIVEN, MATCH, OVERWRITE, RESTORE
from db.staging import ROW_NO, STAGE
from db.unique_values import touched_by


class RoundStage(DependentStage):
    """A staging table whose rows name rows of the table, brought into rounds."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._written = [name for name in self._sql.columns if name not in self._change.key]

    async def make_rounds(self) -> list[list[int]]:
        rows = sorted(self._loaded)
        indexes = () if self._effect is DELETE else self._facts.unique_indexes
        written = self._written if self._effect is OVERWRITE else ["deleted_at"]
        touched = [index for index in indexes if touched_by(index, written)]
        alone = self._facts.changes_on_update or self._names_each_other
        if alone or not all(map(self._is_foreseeable, touched)):
            return [[row] for row in rows] or [[]]
        groups = await self._meeting_the_same()
        if self._effect is RESTORE:
            groups += [group for index in touched for group in await self._restored_alike(index)]
        else:
            mixed = {row for index in touched for row in await self._contended(index)}
            if mixed:
                mixed.update(row for group in groups for row in group)
                return [
                    [row for row in rows if row not in mixed],
                    *([row] for row in sorted(mixed)),
                ]
        rounds: dict[int, list[int]] = {0: []}
        for number, row in in_turn(rows, groups):
            rounds.setdefault(number, []).append(row)
        return [rounds[number] for number in sorted(rounds)]

    @property
    def _names_each_other(self) -> bool:
        """Whether one row that goes, or comes back, may matter to another that does."""
        if self._effect is OVERWRITE:
            return False
        entangled = self._dependents.entangle(self._facts.table_name, self._effect)
        return self._facts.own_parent or entangled

    def _is_foreseeable(self, index: UniqueIndex) -> bool:
        """Whether the place that a row will have in the index can be told from its values."""
        return self._facts.by_key.keys() >= set(index.keys) and index.predicate in (None, LIVE)

    async def _restored_alike(self, index: UniqueIndex) -> list[list[int]]:
        """Staged rows that restore rows with the same values in a unique index."""
        values = ", ".join(f"t.{key} AS u{n}" for n, key in enumerate(index.keys))
        rows = await self._run(
            f"SELECT array_agg(DISTINCT row_no) FROM (SELECT m.row_no, {values} FROM {MATCH} AS m "
            f"JOIN {self._facts.name} AS t ON {self._sql.same_row_as_met('t', 'm')}) AS u "
            f"WHERE {_filled(index)} GROUP BY {', '.join(_places(index))} "
            "HAVING count(DISTINCT row_no) > 1"
        )
        return list(rows.scalars())

    async def _contended(self, index: UniqueIndex) -> list[int]:
        """Rows that would be alike in a unique index, or want what another named row has there."""
        columns = [self._facts.by_key[key].name for key in index.keys]
        wanted = ", ".join(f"{self._wanted(name)} AS u{n}" for n, name in enumerate(columns))
        alike = " AND ".join(
            f"t.{key} {equals(index)} n.{place}"
            for key, place in zip(index.keys, _places(index), strict=True)
        )
        own = ", ".join(
            f"t.{quote(name)} AS {key}" for name, key in zip(self._key, self._sql.keys, strict=True)
        )
        same = " AND ".join(f"m.{key} = h.{key}" for key in self._sql.keys)
        return await self._numbers(
            f"WITH n AS (SELECT m.row_no, {wanted} FROM {MATCH} AS m "
            f"JOIN {STAGE} AS s ON s.{ROW_NO} = m.row_no "
            f"JOIN {self._facts.name} AS t ON {self._sql.same_row_as_met('t', 'm')}), "
            f"h AS (SELECT n.row_no, o.* FROM n CROSS JOIN LATERAL (SELECT {own} "
            f"FROM {self._facts.name} AS t WHERE {index.predicate or 'true'} AND {alike} OFFSET 0) "
            f"AS o WHERE {_filled(index)}), "
            f"c AS (SELECT h.row_no AS one, m.row_no AS other FROM h JOIN {MATCH} AS m ON {same} "
            "WHERE m.row_no <> h.row_no) "
            "SELECT one FROM c UNION SELECT other FROM c UNION SELECT unnest(rows) FROM "
            f"(SELECT array_agg(row_no) AS rows FROM n WHERE {_filled(index)} "
            f"GROUP BY {', '.join(_places(index))} HAVING count(*) > 1) AS alike"
        )

    def _wanted(self, name: str) -> str:
        """What a row will have in a column."""
        if name not in self._written:
            return f"t.{quote(name)}"
        giving = [number for number, given in enumerate(self._kinds) if name in given]
        if len(giving) == len(self._kinds):
            return f"s.{quote(name)}"
        listed = ", ".join(map(str, giving))
        return f"CASE WHEN s.{GIVEN} IN ({listed}) THEN s.{quote(name)} ELSE t.{quote(name)} END"


def _places(index: UniqueIndex) -> list[str]:
    return [f"u{n}" for n in range(len(index.keys))]


def _filled(index: UniqueIndex) -> str:
    """That a row takes part in the index."""
    if index.nulls_equal:
        return "true"
    return " AND ".join(f"{place} IS NOT NULL" for place in _places(index))


def equals(index: UniqueIndex) -> str:
    """The operator that tells whether two values count as the same in the index."""
    return "IS NOT DISTINCT FROM" if index.nulls_equal else "="
