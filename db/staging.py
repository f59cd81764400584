"""The staging table of one chunk: its rows by COPY, and from there by few statements.

From it the rows go by one INSERT, in input order. Only when PostgreSQL refuses that are the rows
classified, by its own constraints; what is still refused is found by halving. Rows of one chunk see
each other exactly as if they were inserted one by one.

What a statement wrote is never inferred, since a BEFORE trigger may leave rows out and give others
a new key: while a row is inserted a setting holds its number, and RETURNING reads it back.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any, Literal, Self

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db.batch import Batch
from db.catalog import ForeignKey, TableFacts, UniqueIndex, quote
from db.copy import copy_lines, copy_rows
from db.errors import BulwarkError
from db.ledger.audit import Keys
from db.refusal import (
    PASSED_OVER,
    Refusal,
    RowFault,
    by_constraint,
    savepoint,
    suppressed,
)

OnConflict = Literal["reject", "skip", "update"]
STAGE = "bulwark_stage"
ROW_NO = "bulwark_row_no"
HELD = "bulwark_held"
CURRENT_ROW = "bulwark.row_no"
MOST_NAMED = 10


class Default:
    """In place of a value: the row leaves the column to the database."""


DEFAULT = Default()


@dataclass(frozen=True)
class Inserted:
    """What became of the rows, by their position: each is in exactly one of the three."""

    keys: Keys
    inserted: frozenset[int] = frozenset()
    skipped: frozenset[int] = frozenset()
    refused: dict[int, Refusal] = field(default_factory=dict)

    def positions(self) -> list[int]:
        """Those of all rows that have an outcome, as often as they have one."""
        return [*self.inserted, *self.skipped, *self.refused]

    def accounting_for(self, rows: int) -> Self:
        """The same; Miscounted unless each of so many rows has exactly one outcome."""
        told = sorted(self.positions())
        if told != list(range(rows)):
            twice = sorted({one for one, next_one in pairwise(told) if one == next_one})
            raise Miscounted(
                f"{len(told)} outcomes were told for {rows} rows ({len(self.inserted)} inserted, "
                f"{len(self.skipped)} skipped, {len(self.refused)} refused): without an outcome "
                f"are the positions {sorted(set(range(rows)) - set(told))[:MOST_NAMED]}, with two "
                f"of them {twice[:MOST_NAMED]}; nothing of this chunk is kept, please report it"
            )
        return self


class Miscounted(BulwarkError):
    """The outcomes of a chunk's rows do not add up: an error of Bulwark itself."""


class Stage:
    """The staging table of one chunk; it lives as long as the transaction.

    What is done to the rows concerns those in scope: all, unless `_scope` and its SQL, to be added
    to a condition, say otherwise.
    """

    _scope: frozenset[int] | None = None
    _scope_sql = ""
    _insert_order = ROW_NO

    def __init__(
        self,
        session: AsyncSession,
        facts: TableFacts,
        columns: tuple[str, ...],
        on_conflict: OnConflict,
    ) -> None:
        self._session = session
        self._facts = facts
        self._columns = columns
        self._on_conflict = on_conflict
        self._loaded: set[int] = set()
        self._inserted: set[int] = set()
        self._held: dict[int, Refusal] = {}
        self._skipped: set[int] = set()
        self._refused: dict[int, Refusal] = {}

    async def _run(self, sql: str, **bind: Any) -> sa.CursorResult[Any]:
        """Run SQL in which only the given names are parameters: expressions may hold colons."""
        names = "|".join(bind) or "(?!)"
        text = sa.text(re.sub(rf":(?!(?:{names})\b)", r"\:", sql))
        # typed as any Result, but textual SQL always gives a CursorResult
        return await self._session.execute(text, bind)  # type: ignore[return-value]  # see above

    @property
    def _targets(self) -> list[str]:
        """The columns that are written: those given, and every other one that has a default."""
        return [
            column.name
            for column in self._facts.columns
            if column.name in self._columns or column.default is not None
        ]

    async def create(self) -> None:
        """Make the staging table, with all columns and defaults of the target, unconstrained."""
        names = ", ".join(quote(column.name) for column in self._facts.columns)
        await self._run(f"DROP TABLE IF EXISTS pg_temp.{STAGE}")
        await self._run(
            f"CREATE TEMPORARY TABLE {STAGE} ON COMMIT DROP AS SELECT {names}, 0 AS {ROW_NO}, "
            f"false AS {HELD} FROM {self._facts.name} WITH NO DATA"
        )
        defaults = [
            f"ALTER {quote(column.name)} SET DEFAULT {column.default}"
            for column in self._facts.columns
            if column.default is not None
        ]
        defaults.append(f"ALTER {HELD} SET DEFAULT false")
        defaults += [
            f"ADD {quote(column.name)} {column.type} GENERATED ALWAYS AS ({column.expression}) "
            "STORED"
            for column in self._facts.generated
        ]
        await self._run(f"ALTER TABLE {STAGE} " + ", ".join(defaults))
        if self._facts.deferrable:
            await self._run("SET CONSTRAINTS ALL IMMEDIATE")

    async def load_all(self, batch: Batch) -> None:
        """COPY all rows in, at once if nothing stands against it; a value may be DEFAULT."""
        self._batch = batch
        if batch.lines is not None and await self._load_lines(batch.lines):
            self._loaded.update(range(len(batch)))
            return
        for names, run in _runs(self._facts, self._columns, batch.records):
            await self.load(names, run)

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

    def _all_different(self, index: UniqueIndex) -> bool:
        """Whether a look at the values tells that no two rows are alike in a unique index."""
        own = (self._facts.primary_key, tuple(map(quote, self._facts.primary_key)))
        if index.keys in own and self._keys_tell_rows:
            return True
        plain = {quote(one.name): one for one in self._facts.columns}
        plain |= {one.name: one for one in self._facts.columns}
        columns = [plain.get(key) for key in index.keys]
        if any(column is None or not column.comparable for column in columns):
            return False
        left_out = [one for one in columns if one is not None and one.name not in self._columns]
        if left_out:  # all rows have the same there: a default, or null
            return not index.nulls_equal and any(one.default is None for one in left_out)
        places = [self._columns.index(one.name) for one in columns if one is not None]
        keys = [tuple(record[at] for at in places) for record in self._batch.records]
        filled = [key for key in keys if index.nulls_equal or None not in key]
        return len(set(filled)) == len(filled)

    async def _load_lines(self, lines: Sequence[str]) -> bool:
        numbered = [f"{number}\t{line}\n" for number, line in enumerate(lines)]
        try:
            async with savepoint(self._session):
                await copy_lines(self._session, STAGE, None, [ROW_NO, *self._columns], numbered)
        except RowFault:
            return False
        return True

    async def load(
        self, columns: tuple[str, ...], rows: Sequence[tuple[int, Sequence[Any]]]
    ) -> None:
        """COPY the rows in; a row whose values PostgreSQL cannot take at all is refused alone."""
        try:
            async with savepoint(self._session):
                await self._copy(columns, rows)
        except RowFault as fault:
            if len(rows) == 1:
                self._refused[rows[0][0]] = fault.refusal(self._facts)
                return
            middle = len(rows) // 2
            await self.load(columns, rows[:middle])
            await self.load(columns, rows[middle:])
        else:
            self._loaded.update(number for number, _ in rows)

    async def _copy(
        self, columns: tuple[str, ...], rows: Sequence[tuple[int, Sequence[Any]]]
    ) -> None:
        records = ((number, *values) for number, values in rows)
        await copy_rows(self._session, STAGE, None, [ROW_NO, *columns], records)

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

    @property
    def _keys_tell_rows(self) -> bool:
        """Whether every staged row has a key of its own, which no trigger changes."""
        keys = self._facts.primary_key
        drawn = all(name in self._facts.defaulted and name not in self._columns for name in keys)
        return bool(keys) and drawn and not self._facts.has_triggers

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
            self._refused[number] = refusal

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

    async def _measure(self) -> None:
        """Tell the planner what the staging table holds; without it it loops over all pairs."""
        names = ", ".join(map(quote, (ROW_NO, HELD, *self._facts.primary_key)))
        await self._run(f"ANALYZE {STAGE} ({names})")

    async def _refuse(
        self, condition: str, code: str, constraint: str | None, column: str | None = None
    ) -> None:
        refusal = self._known(code, constraint, column)
        for number in await self._staged(condition):
            self._refused.setdefault(number, refusal)
            self._loaded.discard(number)

    def _known(self, code: str, constraint: str | None, column: str | None = None) -> Refusal:
        refusal = by_constraint(self._facts, code, constraint, column)
        assert refusal is not None
        return refusal

    def _in_scope(self) -> AbstractSet[int]:
        return self._loaded if self._scope is None else self._loaded & self._scope

    async def _staged(self, condition: str) -> list[int]:
        sql = f"SELECT {ROW_NO} FROM {STAGE} AS s WHERE ({condition}){self._scope_sql}"
        rows = await self._run(sql)
        return [number for number in rows.scalars() if number in self._loaded]

    async def _hold(self, numbers: Iterable[int]) -> None:
        await self._run(
            f"UPDATE {STAGE} SET {HELD} = true WHERE {ROW_NO} = ANY(:numbers) AND NOT {HELD}",
            numbers=list(numbers),
        )

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
            rows = await self._run(self._clash_sql(index), numbers=list(numbers))
            for number in rows.scalars():
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
        where = f"{ROW_NO} = ANY(:numbers)" if only_inserted else "true"
        rows = await self._run(
            f"SELECT min(k) AS low, max(k) AS high FROM (SELECT {key} AS k, {key} - row_number() "
            f"OVER (ORDER BY {key}) AS island FROM {STAGE} WHERE {where}) AS keys "
            "GROUP BY island ORDER BY 1",
            **({"numbers": sorted(self._inserted)} if only_inserted else {}),
        )
        return [(row.low, row.high) for row in rows]


def orphaned(key: ForeignKey) -> str:
    given = " AND ".join(f"s.{quote(name)} IS NOT NULL" for name in key.columns)
    same = " AND ".join(
        f"p.{quote(theirs)} = s.{quote(ours)}"
        for ours, theirs in zip(key.columns, key.table_columns, strict=True)
    )
    return f"{given} AND NOT EXISTS (SELECT FROM {key.table} AS p WHERE {same})"


def _runs(
    facts: TableFacts, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> Iterator[tuple[tuple[str, ...], list[tuple[int, Sequence[Any]]]]]:
    """Consecutive rows that leave the same columns to the database, without those; numbered."""
    optional = [at for at, name in enumerate(columns) if name in facts.defaulted]
    for left, run in groupby(
        enumerate(rows), lambda row: [at for at in optional if row[1][at] is DEFAULT]
    ):
        given = [at for at in range(len(columns)) if at not in left]
        names = tuple(columns[at] for at in given)
        yield names, [(n, row if not left else [row[at] for at in given]) for n, row in run]
