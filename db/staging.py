"""The staging table of one chunk: its rows by COPY, and what is said of them there."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from itertools import groupby
from types import MappingProxyType
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db.batch import DEFAULT, Batch
from db.catalog import ForeignKey, TableFacts, UniqueIndex, quote
from db.copy import copy_lines, copy_rows
from db.refusal import Refusal, RowFault, by_constraint, savepoint
from db.unique_values import places_in, stays_apart

OnConflict = Literal["reject", "skip", "update"]
STAGE = "bulwark_stage"
ROW_NO = "bulwark_row_no"
HELD = "bulwark_held"


class Stage:
    """The staging table of one chunk; it lives as long as the transaction.

    What is done to the rows concerns those in scope: all, unless `_scope` and its SQL, to be added
    to a condition, say otherwise. The SQL takes parameters, so that it can be planned once.
    """

    _scope: frozenset[int] | None = None
    _scope_sql = ""
    _scope_bind: Mapping[str, Any] = MappingProxyType({})
    _drawn_late: str | None = None
    """The key that is taken from its sequence not before rows are inserted, if that is so."""

    def __init__(self, session: AsyncSession, facts: TableFacts, columns: tuple[str, ...]) -> None:
        self._session = session
        self._facts = facts
        self._columns = columns
        self._loaded: set[int] = set()
        self._refused: dict[int, Refusal] = {}

    async def _run(self, sql: str, **bind: Any) -> sa.CursorResult[Any]:
        """Run SQL in which only the given names are parameters: expressions may hold colons."""
        bind |= {name: one for name, one in self._scope_bind.items() if f":{name}" in sql}
        names = "|".join(bind) or "(?!)"
        text = sa.text(re.sub(rf":(?!(?:{names})\b)", r"\:", sql))
        # typed as any Result, but textual SQL always gives a CursorResult
        return await self._session.execute(text, bind)  # type: ignore[return-value]  # text gives a CursorResult

    async def _numbers(self, sql: str, **bind: Any) -> list[int]:
        """What a query of one column gives, as one array: thousands of rows cost much more."""
        found = (await self._run(f"SELECT array_agg(n) FROM ({sql}) AS found (n)", **bind)).scalar()
        return found or []

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
            if column.default is not None and column.name != self._drawn_late
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
        for places, rows in self._runs():
            await self._load(places, rows)

    def _runs(self) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        """Consecutive rows that leave the same columns to the database, and where the others are.

        Both are positions, one of rows in the batch, one of values in a row.
        """
        every = range(len(self._columns))
        if self._batch.lines is not None:
            yield every, range(len(self._batch))
            return
        records = self._batch.records
        optional = [at for at in every if self._columns[at] in self._facts.defaulted]
        for left, run in groupby(
            range(len(records)), lambda row: [at for at in optional if records[row][at] is DEFAULT]
        ):
            yield [at for at in every if at not in left], list(run)

    async def _load(self, places: Sequence[int], rows: Sequence[int]) -> None:
        """COPY rows in; one whose values PostgreSQL cannot take at all is refused alone."""
        try:
            async with savepoint(self._session):
                await self._copy(places, rows)
        except RowFault as fault:
            if len(rows) == 1:
                self._refused[rows[0]] = fault.refusal(self._facts)
                return
            middle = len(rows) // 2
            await self._load(places, rows[:middle])
            await self._load(places, rows[middle:])
        else:
            self._loaded.update(rows)

    async def _copy(self, places: Sequence[int], rows: Sequence[int]) -> None:
        names = [ROW_NO, *(self._columns[at] for at in places)]
        batch = self._batch
        if batch.written and places:
            lines = (f"{row}\t{batch.line(row, places)}" for row in rows)
            await copy_lines(self._session, STAGE, None, names, lines)
        else:
            records = ((row, *(batch.records[row][at] for at in places)) for row in rows)
            await copy_rows(self._session, STAGE, None, names, records)

    async def _measure(self) -> None:
        """Tell the planner what the staging table holds; without it it loops over all pairs."""
        names = ", ".join(map(quote, (ROW_NO, HELD, *self._facts.primary_key)))
        await self._run(f"ANALYZE {STAGE} ({names})")

    @contextmanager
    def _narrowed(
        self, condition: str, rows: frozenset[int] | None = None, **bind: Any
    ) -> Iterator[None]:
        """Let only rows be in scope that fulfil a condition, too."""
        scope, sql, binds = self._scope, self._scope_sql, self._scope_bind
        self._scope = scope if rows is None else rows
        self._scope_sql, self._scope_bind = f"{sql} AND {condition}", {**binds, **bind}
        try:
            yield
        finally:
            self._scope, self._scope_sql, self._scope_bind = scope, sql, binds

    def _in_scope(self) -> AbstractSet[int]:
        return self._loaded if self._scope is None else self._loaded & self._scope

    async def _staged(self, condition: str) -> list[int]:
        sql = f"SELECT {ROW_NO} FROM {STAGE} AS s WHERE ({condition}){self._scope_sql}"
        return [number for number in await self._numbers(sql) if number in self._loaded]

    async def _set(self, column: str, values: Mapping[int, int]) -> None:
        """Give some of the staged rows a value in a column of the staging table's own."""
        if values:
            await self._run(
                f"UPDATE {STAGE} SET {column} = these.value FROM unnest(CAST(:rows AS int[]), "
                f"CAST(:values AS bigint[])) AS these (row, value) WHERE {ROW_NO} = these.row",
                rows=list(values.keys()),
                values=list(values.values()),
            )

    async def _hold(self, numbers: Iterable[int]) -> None:
        await self._run(
            f"UPDATE {STAGE} SET {HELD} = true WHERE {ROW_NO} = ANY(:numbers) AND NOT {HELD}",
            numbers=list(numbers),
        )

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

    def _settle(self, number: int, refusal: Refusal) -> None:
        """Let PostgreSQL's refusal of a row be its outcome."""
        self._refused[number] = refusal

    def _all_different(self, index: UniqueIndex) -> bool:
        """Whether a look at the values tells that no two rows are alike in a unique index."""
        if stays_apart(self._facts, index, self._columns) and not self._facts.has_triggers:
            return True
        places = places_in(self._facts, index, self._columns)
        if places is None:
            return False
        keys = [tuple(record[at] for at in places) for record in self._batch.records]
        filled = [key for key in keys if index.nulls_equal or None not in key]
        return len(set(filled)) == len(filled)

    @property
    def _keys_tell_rows(self) -> bool:
        """Whether every staged row has a key of its own, which no trigger changes."""
        keys = self._facts.primary_key
        drawn = all(name in self._facts.defaulted and name not in self._columns for name in keys)
        return bool(keys) and drawn and not self._facts.has_triggers


def orphaned(key: ForeignKey) -> str:
    """That a staged row s names by this key a row that is not there."""
    given = " AND ".join(f"s.{quote(name)} IS NOT NULL" for name in key.columns)
    same = " AND ".join(
        f"p.{quote(theirs)} = s.{quote(ours)}"
        for ours, theirs in zip(key.columns, key.table_columns, strict=True)
    )
    return f"{given} AND NOT EXISTS (SELECT FROM {key.table} AS p WHERE {same})"
