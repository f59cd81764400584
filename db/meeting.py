"""Which rows of a table the staged rows meet, and in which rounds they may take effect.

A row meets the table's row with which it would clash on any of its unique indexes. Rows of the
chunk that meet each other, or the same row of the table, are in different rounds.
"""

from collections import defaultdict

from sqlalchemy.ext.asyncio import AsyncSession

from db.catalog import LIVE, TableFacts, UniqueIndex, quote
from db.direct_copy import integer_key
from db.matching import MatchStage, in_turn
from db.merging import Given, Merging
from db.overwriting import MATCH
from db.staged_insert import StagedInsert
from db.staging import ROW_NO, STAGE

DELETED = "deleted_at IS NOT NULL"


class MeetingStage(MatchStage, StagedInsert):
    """A staging table whose rows may meet others."""

    def __init__(
        self,
        session: AsyncSession,
        facts: TableFacts,
        columns: tuple[str, ...],
        given: Given,
        merging: Merging,
    ) -> None:
        super().__init__(session, facts, columns, given, merging.journal, merging.sensitive)
        self._on_conflict = merging.on_conflict
        self._merging = merging
        key = integer_key(facts)
        if key is not None and key.sequence and key.name not in columns:
            self._drawn_late = key.name

    # Meeting

    async def _match(self) -> None:
        """Note which rows of the table the rows in scope meet, live ones and deleted ones."""
        looks = [(index, index.predicate) for index in self._met_by]
        if self._merges_deleted:
            looks += [(index, DELETED) for index in self._met_by if index.predicate == LIVE]
        for number, (index, theirs) in enumerate(looks):
            unknown = self._not_met_by(index) if number and theirs != DELETED else ""
            new = f" WHERE NOT {self._noted('t')}" if number else ""
            await self._run(
                f"INSERT INTO {MATCH} SELECT s.row_no, t.* "
                f"{self._met_sql(index, theirs, self._sql.picked('o'), unknown)}{new}"
            )
            if not (number or self._scope_bind):
                await self._run(f"ANALYZE {MATCH}")

    @property
    def _merges_deleted(self) -> bool:
        return self._sql.soft and self._merging.on_deleted != "insert"

    def _noted(self, table: str) -> str:
        """That this row of the table is among those that the staged row is known to meet."""
        same = ["m.row_no = s.row_no", f"m.place = {table}.place"]
        same += [f"m.{key} = {table}.{key}" for key in self._sql.keys]
        return f"EXISTS (SELECT FROM {MATCH} AS m WHERE {' AND '.join(same)})"

    def _not_met_by(self, index: UniqueIndex) -> str:
        """That no row that is known already has the staged row's key; then none has, being unique.

        Empty where what is known of a row does not tell.
        """
        names = {quote(name): self._sql.old(name) for name in self._sql.imaged}
        names |= dict(zip(map(quote, self._key), self._sql.keys, strict=True))
        if (
            index.deferrable
            or index.predicate not in (None, LIVE)
            or not names.keys() >= set(map(quote, index.keys))
        ):
            return ""
        equal = "IS NOT DISTINCT FROM" if index.nulls_equal else "="
        same = [f"m.{names[quote(key)]} {equal} {STAGE}.{key}" for key in index.keys]
        if index.predicate == LIVE:
            same.append("m.deleted_at IS NULL")
        known = f"m.row_no = {STAGE}.{ROW_NO} AND {' AND '.join(same)}"
        return f" AND NOT EXISTS (SELECT FROM {MATCH} AS m WHERE {known})"

    @property
    def _met_by(self) -> list[UniqueIndex]:
        """The unique indexes on which rows can meet others: not that of a key they do not give."""
        return [
            index
            for index in self._facts.unique_indexes
            if (index.keys != tuple(map(quote, self._key)) and index.keys != self._key)
            or set(self._key) & set(self._columns)
        ]

    def _met_sql(
        self, index: UniqueIndex, theirs: str | None, wanted: str, narrower: str = ""
    ) -> str:
        """FROM the rows s in scope and the rows t that they meet.

        OFFSET 0 makes it a look-up for each row, whatever the planner believes of the table.
        """
        ours = ", ".join(f"{key} AS u{n}" for n, key in enumerate(index.keys))
        filled = " AND ".join(f"({key}) IS NOT NULL" for key in index.keys)
        equal = "IS NOT DISTINCT FROM" if index.nulls_equal else "="
        same = " AND ".join(f"{key} {equal} s.u{n}" for n, key in enumerate(index.keys))
        return (
            f"FROM (SELECT {ROW_NO} AS row_no, {ours} "
            f"FROM {STAGE} WHERE {index.predicate or 'true'} "
            f"AND {'true' if index.nulls_equal else filled}{self._scope_sql}{narrower}) AS s "
            f"CROSS JOIN LATERAL (SELECT {wanted} FROM {self._facts.name} AS o "
            f"WHERE {theirs or 'true'} AND {same} OFFSET 0) AS t"
        )

    async def _met_otherwise(self) -> bool:
        """Whether rows in scope meet by now, in a unique index, rows that they did not meet."""
        keys = ", ".join(self._sql.keys)
        own = zip(self._key, self._sql.keys, strict=True)
        wanted = ", ".join(f"o.{quote(name)} AS {key}" for name, key in own)
        pairs = " UNION ".join(
            f"SELECT s.row_no, {keys} {self._met_sql(index, index.predicate, wanted)}"
            for index in self._met_by
        )
        if not pairs:
            return False
        new = await self._run(
            f"SELECT EXISTS (SELECT * FROM ({pairs}) AS now "
            f"EXCEPT SELECT row_no, {keys} FROM {MATCH})"
        )
        return bool(new.scalar_one())

    # Rounds

    async def make_rounds(self) -> list[list[int]]:
        """The rows in rounds: of those that may meet the same row, one in each, in input order."""
        rows = sorted(self._loaded)
        if not self._foreseeable:
            return [[row] for row in rows] or [[]]
        groups = [
            group
            for index in self._met_by
            if not self._all_different(index)
            for group in await self._alike(index)
        ]
        groups += await self._meeting_the_same()
        if not groups:
            return [rows]
        rounds: dict[int, list[int]] = defaultdict(list)
        for number, row in in_turn(rows, groups):
            rounds[number].append(row)
        return [rounds[number] for number in sorted(rounds)]

    @property
    def _foreseeable(self) -> bool:
        """Whether the keys that a row will have can be told from its staged values.

        Not where triggers have a say, where a row may need one that stands before it, and where an
        update makes a key of staged values and of what is there.
        """
        if self._facts.has_triggers or self._facts.changes_on_update or self._facts.own_parent:
            return False
        return all(self._is_own(index) for index in self._facts.unique_indexes)

    def _is_own(self, index: UniqueIndex) -> bool:
        """Whether an updated row has in this index what it had, or nothing but its own values."""
        written = set(self._columns).intersection(*self._kinds)
        if self._merging.update is not None:
            written &= self._merging.update
        names = {key.strip('"') for key in index.keys}
        revives = self._merging.on_deleted == "revive" and not names <= set(self._key)
        whole = names <= written or names <= set(self._key)
        return (
            self._facts.by_key.keys() >= set(index.keys)
            and index.predicate in (None, LIVE)
            and (whole or (len(names) == 1 and not revives))
        )

    async def _alike(self, index: UniqueIndex) -> list[list[int]]:
        """Staged rows with the same values in a unique index."""
        keys = ", ".join(index.keys)
        given = " AND ".join(f"({key}) IS NOT NULL" for key in index.keys)
        rows = await self._run(
            f"SELECT array_agg({ROW_NO}) FROM {STAGE} WHERE {index.predicate or 'true'} "
            f"AND {'true' if index.nulls_equal else given} GROUP BY {keys} HAVING count(*) > 1"
        )
        return list(rows.scalars())
