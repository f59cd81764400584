"""From the staging table into the target: by one INSERT, in input order.

Only when PostgreSQL refuses that are the rows classified, by its own constraints; what is still
refused is found by halving. Rows of one chunk see each other exactly as if they were inserted one
by one.

What a statement wrote is never inferred, since a BEFORE trigger may leave rows out and give others
a new key: while a row is inserted a setting holds its number, and RETURNING reads it back.
"""

from collections.abc import Sequence

from sqlalchemy.ext.asyncio import AsyncSession

from db.catalog import TableFacts, UniqueIndex, quote
from db.ledger.audit import Keys
from db.outcome import Inserted, Miscounted
from db.refusal import PASSED_OVER, Refusal, RowFault, savepoint, suppressed
from db.staging import HELD, ROW_NO, STAGE, OnConflict, Stage, orphaned

CURRENT_ROW = "bulwark.row_no"


class StagedInsert(Stage):
    """A staging table whose rows are inserted."""

    _insert_order = ROW_NO

    def __init__(
        self,
        session: AsyncSession,
        facts: TableFacts,
        columns: tuple[str, ...],
        on_conflict: OnConflict = "reject",
    ) -> None:
        super().__init__(session, facts, columns)
        self._on_conflict = on_conflict
        self._inserted: set[int] = set()
        self._held: dict[int, Refusal] = {}
        self._skipped: set[int] = set()

    @property
    def _targets(self) -> list[str]:
        """The columns that are written: those given, and every other one that has a default."""
        return [
            column.name
            for column in self._facts.columns
            if column.name in self._columns or column.default is not None
        ]

    def sort_if_independent(self) -> None:
        """Insert in an order that all imports share, if the rows do not clash with each other.

        Then they wait for each other in no circle. Rows that clash go in as they came.
        """
        alone = not self._facts.has_triggers and not self._facts.own_parent
        if alone and all(map(self._all_different, self._facts.unique_indexes)):
            self.sort()

    def sort(self) -> None:
        """Insert in an order that all imports share."""
        order = [
            f'{quote(name)} COLLATE "C"' if self._facts.column(name).collated else quote(name)
            for name in self._facts.shared_order(self._columns)
        ]
        self._insert_order = ", ".join([*order, ROW_NO])

    async def insert_at_once(self) -> bool:
        """Insert all staged rows; false, with nothing done, when PostgreSQL refuses some row."""
        try:
            await self._insert()
        except RowFault:
            return False
        return True

    async def insert_halving(self, first: int, end: int) -> None:
        """Insert the rows of a range, finding those that PostgreSQL refuses by halving it."""
        try:
            await self._insert(first, end)
        except RowFault as fault:
            if end - first == 1:
                self._settle(first, fault.refusal(self._facts))
                return
            middle = (first + end) // 2
            await self.insert_halving(first, middle)
            await self.insert_halving(middle, end)

    async def insert_one_by_one(self) -> None:
        """For a table that references itself: a row may need one that stands before it."""
        for number in sorted(self._in_scope()):
            await self.insert_halving(number, number + 1)

    async def _insert(
        self, first: int | None = None, end: int | None = None, *, arbitrate: bool = True
    ) -> None:
        """Insert the staged rows that are not held back, all or those of a range.

        Without arbitration a row that clashes is the statement's fault, and a leftover one that a
        trigger left out.
        """
        wanted = self._in_scope() - self._held.keys()
        where, bind = f"NOT {HELD}{self._scope_sql}", {}
        if first is not None and end is not None:
            wanted &= set(range(first, end))
            where, bind = (
                f"{where} AND {ROW_NO} >= :first AND {ROW_NO} < :end",
                {"first": first, "end": end},
            )
        if not wanted:
            return
        arbitrate = arbitrate and self._arbitrable
        async with savepoint(self._session):
            sql = self._insert_sql(where, arbitrate=arbitrate)
            told: list[int] = (await self._run(sql, **bind)).scalar_one()
        written = set(told)
        if len(written) != len(told) or not written <= wanted:
            raise Miscounted(f"{len(told)} rows were written of {len(wanted)} that were staged")
        self._inserted |= written
        if not arbitrate:
            for number in wanted - written:
                self._settle(number, suppressed(self._facts))

    @property
    def _arbitrable(self) -> bool:
        """Whether ON CONFLICT may stand in the statement.

        Not where a leftover would have to be explained and a trigger may be the cause: that could
        only be told by firing the trigger again.
        """
        explained = self._on_conflict != "skip"
        return self._facts.arbitrable and not (explained and self._facts.has_triggers)

    def _insert_sql(self, where: str, *, arbitrate: bool) -> str:
        """OFFSET 0 keeps the planner from setting the number before the rows are sorted."""
        if self._keys_tell_rows:
            return self._plain_insert_sql(where, arbitrate=arbitrate)
        names = ", ".join(map(quote, self._targets))
        key = "".join(f", t.{quote(name)}" for name in self._facts.primary_key)
        may_rekey = self._facts.has_triggers
        return (
            f"WITH written AS (INSERT INTO {self._facts.name} AS t ({names}) "
            f"OVERRIDING SYSTEM VALUE SELECT {names} FROM "
            f"(SELECT {names}, {ROW_NO} FROM {STAGE} WHERE {where} "
            f"ORDER BY {self._insert_order} OFFSET 0) "
            f"AS s WHERE set_config('{CURRENT_ROW}', CAST({ROW_NO} AS text), true) IS NOT NULL "
            f"{'ON CONFLICT DO NOTHING' if arbitrate else ''} "
            f"RETURNING CAST(current_setting('{CURRENT_ROW}') AS int) AS {ROW_NO}"
            f"{key if may_rekey else ''}){self._rekeyed_sql() if may_rekey else ''} "
            f"SELECT ARRAY(SELECT {ROW_NO} FROM written)"
        )

    def _plain_insert_sql(self, where: str, *, arbitrate: bool) -> str:
        names = ", ".join(map(quote, self._targets))
        return (
            f"WITH written AS (INSERT INTO {self._facts.name} AS t ({names}) "
            f"OVERRIDING SYSTEM VALUE SELECT {names} FROM {STAGE} WHERE {where} "
            f"ORDER BY {self._insert_order} {'ON CONFLICT DO NOTHING' if arbitrate else ''} "
            f"RETURNING {', '.join(f't.{quote(name)}' for name in self._facts.primary_key)}) "
            f"SELECT ARRAY(SELECT s.{ROW_NO} FROM {STAGE} AS s, written AS w "
            f"WHERE {self._same_row('s', 'w')})"
        )

    def _rekeyed_sql(self) -> str:
        """Give the staged rows the keys under which they were really written."""
        writable = {column.name for column in self._facts.columns}
        keys = [name for name in self._facts.primary_key if name in writable]
        if not keys:
            return ""
        new = ", ".join(f"{quote(name)} = w.{quote(name)}" for name in keys)
        return (
            f", rekeyed AS (UPDATE {STAGE} AS s SET {new} FROM written AS w "
            f"WHERE s.{ROW_NO} = w.{ROW_NO})"
        )

    def _same_row(self, one: str, other: str) -> str:
        return " AND ".join(
            f"{one}.{quote(name)} = {other}.{quote(name)}" for name in self._facts.primary_key
        )

    def _settle(self, number: int, refusal: Refusal) -> None:
        if refusal.code in PASSED_OVER and self._on_conflict == "skip":
            self._skipped.add(number)
        else:
            super()._settle(number, refusal)

    async def classify(self) -> None:
        """Find, as sets, the staged rows that a constraint refuses, and hold them back."""
        await self._measure()
        for column in self._facts.columns:
            if column.not_null and column.name in self._columns:
                await self._refuse(
                    f"{quote(column.name)} IS NULL", "not_null_violation", None, column.name
                )
        for check in self._facts.checks:
            await self._refuse(f"({check.expression}) IS FALSE", "check_violation", check.name)
        for key in self._facts.foreign_keys:
            for number in await self._staged(orphaned(key)):
                self._held.setdefault(number, self._known("foreign_key_violation", key.name))
        await self._hold(self._held.keys() | self._refused.keys())

    async def explain_leftovers(self) -> None:
        """Say why staged rows did not go in: a clash, else the foreign key they were held for."""
        leftover = self._in_scope() - self._inserted - self._refused.keys() - self._held.keys()
        leftover -= self._skipped
        if self._on_conflict == "skip":
            self._skipped |= leftover
            leftover = set()
        if not leftover and not self._held:
            return
        await self._hold(self._in_scope() - self._inserted)
        await self._measure()
        clashes = await self._clashes(sorted(leftover | self._held.keys()))
        for number, index in clashes.items():
            self._settle(number, self._known("unique_violation", index.name))
        for number, refusal in self._held.items():
            if number not in clashes:
                self._refused[number] = refusal
        for number in sorted(leftover - clashes.keys()):
            await self._insert_alone(number)

    async def _insert_alone(self, number: int) -> None:
        """Insert a row that clashed with one gone by now, or with an exclusion constraint."""
        await self._run(f"UPDATE {STAGE} SET {HELD} = false WHERE {ROW_NO} = :row", row=number)
        try:
            await self._insert(number, number + 1, arbitrate=False)
        except RowFault as fault:
            self._settle(number, fault.refusal(self._facts))

    async def _clashes(self, numbers: Sequence[int]) -> dict[int, UniqueIndex]:
        """The first unique index on which each row clashes with a row that was there before it."""
        found: dict[int, UniqueIndex] = {}
        for index in self._facts.unique_indexes:
            if index.deferrable:
                continue
            for number in await self._numbers(self._clash_sql(index), numbers=list(numbers)):
                found.setdefault(number, index)
        return found

    def _clash_sql(self, index: UniqueIndex) -> str:
        keys = ", ".join(f"{key} AS k{n}" for n, key in enumerate(index.keys))
        own = ", ".join(map(quote, self._facts.primary_key))
        where = f"({index.predicate})" if index.predicate else "true"
        equal = "IS NOT DISTINCT FROM" if index.nulls_equal else "="
        same = " AND ".join(f"s.k{n} {equal} t.k{n}" for n in range(len(index.keys)))
        return (
            f"SELECT DISTINCT s.{ROW_NO} FROM (SELECT {ROW_NO}, {keys} FROM {STAGE} "
            f"WHERE {ROW_NO} = ANY(:numbers) AND {where}) AS s "
            f"JOIN (SELECT {own}, {keys} FROM {self._facts.name} WHERE {where}) AS t ON {same} "
            f"WHERE NOT EXISTS (SELECT FROM {STAGE} AS e WHERE {self._same_row('e', 't')} "
            f"AND NOT e.{HELD} AND e.{ROW_NO} > s.{ROW_NO})"
        )

    async def outcome(self) -> Inserted:
        """What became of the rows, once nothing more is to be inserted."""
        keys = await self._keys()
        return Inserted(keys, frozenset(self._inserted), frozenset(self._skipped), self._refused)

    async def _keys(self) -> Keys:
        """The keys of the chunk's rows, for its audit."""
        if not self._inserted:
            return Keys(ranges=[])
        [*names] = self._facts.primary_key
        key = self._facts.column(names[0])
        if len(names) == 1 and key.integer:
            mine = key.sequence and key.name not in self._columns and not self._facts.has_triggers
            return Keys(ranges=await self._ranges(quote(key.name), only_inserted=not mine))
        rows = await self._run(
            f"SELECT {', '.join(map(quote, names))} FROM {STAGE} "
            f"WHERE {ROW_NO} = ANY(:numbers) ORDER BY {ROW_NO}",
            numbers=sorted(self._inserted),
        )
        return Keys(keys=[tuple(row) for row in rows])

    async def _ranges(self, key: str, *, only_inserted: bool) -> list[tuple[int, int]]:
        where = f"{ROW_NO} = ANY(:numbers)" if only_inserted else f"{key} IS NOT NULL"
        rows = await self._run(
            f"SELECT min(k) AS low, max(k) AS high FROM (SELECT {key} AS k, {key} - row_number() "
            f"OVER (ORDER BY {key}) AS island FROM {STAGE} WHERE {where}) AS keys "
            "GROUP BY island ORDER BY 1",
            **({"numbers": sorted(self._inserted)} if only_inserted else {}),
        )
        return [(row.low, row.high) for row in rows]
