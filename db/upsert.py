"""Inserting the rows of one chunk that are new and updating those that are there, as sets.

A row meets the table's row with which it would clash on any of its unique indexes. All rows that
are met are locked first, in the order of their keys; then the staged rows are updated or inserted
by one statement each. Rows of the chunk that meet each other, or the same row of the table, take
effect in rounds, one of them in each, so that all of it ends as if they were applied one by one.

Whatever another transaction changes meanwhile is noticed, raises Race, and the chunk is replayed.
"""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sqlalchemy.ext.asyncio import AsyncSession

from db.batch import Batch
from db.catalog import TableFacts, UniqueIndex, quote
from db.direct_copy import can_copy, insert_directly
from db.errors import Race
from db.ledger.audit import Journal, Keys
from db.refusal import Refusal, RowFault, savepoint
from db.staging import HELD, ROW_NO, STAGE, Inserted, OnConflict, Stage, orphaned

OnDeleted = Literal["insert", "revive", "reject"]
MATCH = "bulwark_match"
ROUND = "bulwark_round"
GIVEN = "bulwark_given"
EXPECTED = "bulwark_expected"
LIVE = "(deleted_at IS NULL)"
DELETED = "deleted_at IS NOT NULL"
LIVE_MATCH = "m.deleted_at IS NULL"
DELETED_MATCH = "m.deleted_at IS NOT NULL"

UPDATE = "update"
REVIVE = "revive"
"""Actions of the audit."""

AMBIGUOUS = "ambiguous_match"
OUTDATED = "version_conflict"
WAS_DELETED = "deleted_match"
WORTH_A_COPY = 100
"""Rows; for fewer, drawing keys and another COPY cost more than they save."""

CONFLICTS = (AMBIGUOUS, OUTDATED)
"""Codes of rows that are valid, but not in agreement with what is there."""


@dataclass(frozen=True)
class Merging:
    """What becomes of a row that meets one that is there, or was.

    `update` are the columns to overwrite, None for all that a row gives. A row with an expected
    version takes effect only on a row of that version.
    """

    on_conflict: OnConflict
    journal: Journal
    on_deleted: OnDeleted = "insert"
    update: frozenset[str] | None = None
    sensitive: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Terms:
    """What the rows give: `given` columns, but for those of which `uneven` says otherwise.

    `expected` are the versions that rows count on. Both are by position.
    """

    given: frozenset[str]
    uneven: Mapping[int, frozenset[str]] = field(default_factory=dict)
    expected: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Merged(Inserted):
    """What became of the rows; what was there before is in the journal."""

    updated: frozenset[int] = frozenset()
    unchanged: frozenset[int] = frozenset()
    revived: frozenset[int] = frozenset()

    def positions(self) -> list[int]:
        return [*super().positions(), *self.updated, *self.unchanged, *self.revived]


async def merge_rows(
    session: AsyncSession,
    facts: TableFacts,
    columns: Sequence[str],
    batch: Batch,
    terms: Terms,
    merging: Merging,
    may_lock: Callable[[], Awaitable[None]],
) -> Merged:
    """Apply rows in the session's transaction and say what became of each.

    What they meet is looked up at once; it is locked, and everything written, when `may_lock`
    returns. A value may be DEFAULT. Rows that meet several rows of the table, or not the version they
    expect, are refused with a code of CONFLICTS. Raises Race, and whatever `insert_rows` raises.
    """
    stage = _Merge(session, facts, tuple(columns), terms, merging)
    await stage.create()
    await stage.fill(batch)
    await stage.look()
    await may_lock()
    await stage.apply_in_rounds()
    merged = await stage.merged()
    return merged.accounting_for(len(batch))


class _Merge(Stage):
    """A staging table whose rows may meet others."""

    def __init__(
        self,
        session: AsyncSession,
        facts: TableFacts,
        columns: tuple[str, ...],
        terms: Terms,
        merging: Merging,
    ) -> None:
        super().__init__(session, facts, columns, merging.on_conflict)
        self._terms = terms
        self._merging = merging
        self._given = list(dict.fromkeys([terms.given, *terms.uneven.values()]))
        self._soft = "deleted_at" in {column.name for column in facts.columns}
        self._inserted_directly: set[int] = set()
        self._direct_ranges: list[tuple[int, int]] = []
        self._clashing: dict[int, Refusal] = {}
        self._updated: set[int] = set()
        self._unchanged: set[int] = set()
        self._revived: set[int] = set()

    # Staging

    async def create(self) -> None:
        """Make the tables; and tell the planner that the pages it will look up are in memory.

        Every page is visited several times; read in full, a large table would be so each time.
        """
        await super().create()
        await self._run("SELECT set_config('random_page_cost', '0.1', true)")
        await self._run(f"DROP TABLE IF EXISTS pg_temp.{MATCH}")
        await self._run(
            f"CREATE TEMPORARY TABLE {MATCH} ON COMMIT DROP AS SELECT 0 AS row_no, "
            f"{self._picked('t')} FROM {self._facts.name} AS t WITH NO DATA"
        )
        await self._run(
            f"ALTER TABLE {STAGE} ADD {ROUND} int NOT NULL DEFAULT 0, "
            f"ADD {GIVEN} int NOT NULL DEFAULT 0, ADD {EXPECTED} bigint"
        )

    def _picked(self, table: str) -> str:
        """What is noted of a row that is met: its place, its keys, and what may be overwritten."""
        keys = [f"{table}.{quote(name)} AS k{n}" for n, name in enumerate(self._key)]
        old = [f"{table}.{quote(name)} AS {self._old(name)}" for name in self._imaged]
        deleted = f"{table}.deleted_at" if self._soft else "CAST(NULL AS timestamptz)"
        return ", ".join([f"{deleted} AS deleted_at", f"{table}.ctid AS place", *keys, *old])

    @property
    def _imaged(self) -> list[str]:
        """The columns that an update may change, but those that it always does."""
        if not self._facts.changes_on_update:
            return self._overwritten()
        return [
            column.name
            for column in self._facts.columns
            if column.name not in {*self._key, *self._facts.on_update, "deleted_at"}
            or column.name in self._overwritten()
        ]

    def _old(self, name: str) -> str:
        return f"o{self._number(name)}"

    def _number(self, name: str) -> int:
        return next(n for n, column in enumerate(self._facts.columns) if column.name == name)

    async def fill(self, batch: Batch) -> None:
        """COPY the rows in, with what each gives and expects where that is not the same for all."""
        self._count = len(batch)
        await self.load_all(batch)
        numbers = {given: number for number, given in enumerate(self._given)}
        uneven = {row: numbers[given] for row, given in self._terms.uneven.items()}
        await self._set(GIVEN, uneven)
        await self._set(EXPECTED, self._terms.expected)
        await self._measure()

    async def _set(self, column: str, values: Mapping[int, int]) -> None:
        """Give some of the staged rows a value in a column of the staging table's own."""
        if values:
            await self._run(
                f"UPDATE {STAGE} SET {column} = these.value FROM unnest(CAST(:rows AS int[]), "
                f"CAST(:values AS bigint[])) AS these (row, value) WHERE {ROW_NO} = these.row",
                rows=list(values.keys()),
                values=list(values.values()),
            )

    @property
    def _key(self) -> tuple[str, ...]:
        return self._facts.primary_key

    def _same_row_as_met(self, table: str, met: str) -> str:
        """That a row is the one that was met: by its place, which is quick, if that is unique."""
        if not self._facts.partitioned:
            return f"{table}.ctid = {met}.place"
        return " AND ".join(
            f"{table}.{quote(name)} = {met}.k{n}" for n, name in enumerate(self._key)
        )

    # Meeting

    async def look(self) -> None:
        """Find out what the rows meet, without a lock on it."""
        await self._match()
        await self._run(f"ANALYZE {MATCH}")

    async def apply_in_rounds(self) -> None:
        """Apply all rows, those that have nothing to do with each other at once."""
        await self._lock()
        rounds = await self._rounds()
        if len(rounds) == 1:
            await self._apply()
            return
        await self._set(ROUND, {row: n for n, rows in enumerate(rounds) if n for row in rows})
        for number, rows in enumerate(rounds):
            self._scope, self._scope_sql = frozenset(rows), f" AND {ROUND} = {number}"
            await self._run(f"TRUNCATE {MATCH}")
            await self._match()
            await self._lock()
            await self._apply()
        self._scope, self._scope_sql = None, ""

    async def _match(self) -> None:
        """Note which rows of the table the rows in scope meet, live ones and deleted ones."""
        pairs = [self._match_sql(index, index.predicate) for index in self._met_by]
        if self._soft and self._merging.on_deleted != "insert":
            pairs += [self._match_sql(x, DELETED) for x in self._met_by if x.predicate == LIVE]
        if pairs:
            await self._run(
                f"INSERT INTO {MATCH} SELECT m.row_no, {self._picked('t')} "
                f"FROM ({' UNION '.join(pairs)}) AS m "
                f"JOIN {self._facts.name} AS t ON {self._same_row_as_met('t', 'm')}"
            )

    @property
    def _met_by(self) -> list[UniqueIndex]:
        """The unique indexes on which rows can meet others: not that of a key they do not give."""
        return [
            index
            for index in self._facts.unique_indexes
            if (index.keys != tuple(map(quote, self._key)) and index.keys != self._key)
            or set(self._key) & set(self._columns)
        ]

    def _match_sql(self, index: UniqueIndex, theirs: str | None) -> str:
        """OFFSET 0 makes it a look-up for each row, whatever the planner believes of the table."""
        ours = ", ".join(f"{key} AS u{n}" for n, key in enumerate(index.keys))
        filled = " AND ".join(f"({key}) IS NOT NULL" for key in index.keys)
        own = ", ".join(f"{quote(name)} AS k{n}" for n, name in enumerate(self._key))
        equal = "IS NOT DISTINCT FROM" if index.nulls_equal else "="
        same = " AND ".join(f"{key} {equal} s.u{n}" for n, key in enumerate(index.keys))
        wanted = ", ".join(f"t.k{n}" for n in range(len(self._key)))
        return (
            f"SELECT s.{ROW_NO} AS row_no, t.place, {wanted} FROM (SELECT {ROW_NO}, {ours} "
            f"FROM {STAGE} WHERE {index.predicate or 'true'} "
            f"AND {'true' if index.nulls_equal else filled}{self._scope_sql}) AS s "
            f"CROSS JOIN LATERAL (SELECT ctid AS place, {own} FROM {self._facts.name} AS o "
            f"WHERE {theirs or 'true'} AND {same} OFFSET 0) AS t"
        )

    async def _lock(self) -> None:
        """Lock what is met, in the order of its keys; Race if any of it has changed before that."""
        order = ", ".join(f"t.{quote(name)}" for name in self._key)
        distinct = ", ".join(f"k{n}" for n in range(len(self._key)))
        met = f"(SELECT DISTINCT {distinct}, place FROM {MATCH})"
        locked = await self._run(
            f"SELECT count(*) FILTER (WHERE now = place), (SELECT count(*) FROM {met} AS m) "
            f"FROM (SELECT t.ctid AS now, m.place FROM {met} AS m JOIN {self._facts.name} AS t "
            f"ON {self._same_row_as_met('t', 'm')} ORDER BY {order} FOR NO KEY UPDATE OF t) AS held"
        )
        unchanged, wanted = tuple(locked.one())
        if unchanged != wanted:
            raise Race

    # Rounds

    async def _rounds(self) -> list[list[int]]:
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
        for number, row in _in_turn(rows, groups):
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
        written = set(self._columns).intersection(*self._given)
        if self._merging.update is not None:
            written &= self._merging.update
        plain = {quote(one.name) for one in self._facts.columns}
        plain |= {one.name for one in self._facts.columns}
        names = {key.strip('"') for key in index.keys}
        revives = self._merging.on_deleted == "revive" and not names <= set(self._key)
        whole = names <= written or names <= set(self._key)
        return (
            plain.issuperset(index.keys)
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

    async def _meeting_the_same(self) -> list[list[int]]:
        """Staged rows that meet the same row."""
        keys = ", ".join(f"k{n}" for n in range(len(self._key)))
        rows = await self._run(
            f"SELECT array_agg(DISTINCT row_no) FROM {MATCH} GROUP BY {keys} "
            "HAVING count(DISTINCT row_no) > 1"
        )
        return list(rows.scalars())

    # Taking effect

    async def _apply(self) -> None:
        """Let the rows in scope take effect, none of which has to do with another."""
        if self._merging.on_deleted != "insert":
            await self._prefer()
        await self._refuse_conflicts()
        met = set(await self._numbers(f"SELECT DISTINCT row_no FROM {MATCH}"))
        if met:
            await self._update_met()
            await self._judge_clashes()
            done = self._updated | self._revived | self._refused.keys() | self._skipped
            self._unchanged |= (met & self._loaded) - done
        await self._insert_the_rest(met)
        await self._judge_clashes()

    async def _prefer(self) -> None:
        """Of what a row meets, leave the live row, else the one that was deleted last."""
        latest = ", ".join(f"k{n} DESC" for n in range(len(self._key)))
        await self._run(
            f"DELETE FROM {MATCH} AS m USING (SELECT row_no, place, deleted_at, "
            "bool_or(deleted_at IS NULL) OVER (PARTITION BY row_no) AS alive, "
            f"row_number() OVER (PARTITION BY row_no ORDER BY deleted_at DESC, {latest}) AS rank "
            f"FROM {MATCH}) AS r WHERE m.row_no = r.row_no AND m.place = r.place "
            "AND r.deleted_at IS NOT NULL AND (r.alive OR r.rank > 1)"
        )
        if self._merging.on_deleted == "reject":
            text = "a row with this key was deleted; restore it, or import with --on-deleted revive"
            await self._put_aside(DELETED, Refusal(WAS_DELETED, text))

    async def _refuse_conflicts(self) -> None:
        if self._merging.on_conflict != "update":
            await self._run(f"DELETE FROM {MATCH} WHERE deleted_at IS NULL")
        text = "it clashes with several rows that are there; give keys of one of them"
        several = f"SELECT row_no FROM {MATCH} GROUP BY row_no HAVING count(*) > 1"
        await self._put_aside(f"row_no IN ({several})", Refusal(AMBIGUOUS, text))
        if self._terms.expected:
            await self._refuse_outdated()

    async def _refuse_outdated(self) -> None:
        text = "the row that is there has not the version that was expected; read it again"
        expected = f"SELECT {ROW_NO} FROM {STAGE} AS s WHERE {EXPECTED} IS NOT NULL"
        await self._put_aside(
            f"EXISTS (SELECT FROM {STAGE} AS s, {self._facts.name} AS t "
            f"WHERE s.{ROW_NO} = m.row_no AND {self._same_row_as_met('t', 'm')} "
            f"AND s.{EXPECTED} <> t.version)",
            Refusal(OUTDATED, text, "version"),
        )
        gone = f"{expected}{self._scope_sql} AND {ROW_NO} NOT IN (SELECT row_no FROM {MATCH})"
        refusal = Refusal(OUTDATED, "a row of that version was expected and none is there")
        for number in await self._numbers(gone):
            self._refused.setdefault(number, refusal)
            self._loaded.discard(number)
        await self._hold(self._refused.keys())

    async def _put_aside(self, condition: str, refusal: Refusal) -> None:
        """Refuse the rows whose match fulfils a condition, and take their matches out."""
        rows = set(
            await self._numbers(f"DELETE FROM {MATCH} AS m WHERE {condition} RETURNING row_no")
        )
        rows &= self._loaded
        if rows:
            self._refused.update(dict.fromkeys(rows, refusal))
            self._loaded -= rows
            await self._hold(rows)

    async def _numbers(self, sql: str) -> list[int]:
        return list((await self._run(sql)).scalars())

    async def _update_met(self) -> None:
        """Update what the rows meet; when one is refused, tell first what can be told in sets."""
        if await self._update_all(None) is not None:
            if not self._facts.changes_on_update:  # what a trigger will make of a row is not known
                await self._classify_met()
            await self._update_halving(None)

    async def _classify_met(self) -> None:
        """Refuse the rows whose values alone break a constraint, in PostgreSQL's order."""
        given = set(self._columns).intersection(*self._given)
        met = f"{ROW_NO} IN (SELECT row_no FROM {MATCH})"
        if self._merging.update is not None:
            given &= self._merging.update
            met = f"{ROW_NO} IN (SELECT row_no FROM {MATCH} WHERE deleted_at IS NULL)"
        for column in self._facts.columns:
            if column.not_null and column.name in given:
                condition = f"{met} AND {quote(column.name)} IS NULL"
                await self._refuse(condition, "not_null_violation", None, column.name)
        for check in self._facts.checks:
            if given.issuperset(check.columns):
                condition = f"{met} AND ({check.expression}) IS FALSE"
                await self._refuse(condition, "check_violation", check.name)
        for key in self._facts.foreign_keys:
            if given.issuperset(key.columns):
                condition = f"{met} AND {orphaned(key)}"
                await self._refuse(condition, "foreign_key_violation", key.name)
        await self._hold(self._refused.keys())

    async def _update_halving(self, span: tuple[int, int] | None) -> None:
        """Update what the rows meet; those that PostgreSQL refuses are found by halving."""
        fault = await self._update_all(span)
        if fault is None:
            return
        first, end = span or (0, self._count)
        if end - first == 1:
            self._settle(first, fault.refusal(self._facts))
            return
        middle = (first + end) // 2
        await self._update_halving((first, middle))
        await self._update_halving((middle, end))

    async def _update_all(self, span: tuple[int, int] | None) -> RowFault | None:
        """Update and revive what the rows of a span meet; or do nothing, and return the fault."""
        try:
            async with savepoint(self._session):
                updated = await self._update(span, revive=False)
                revived = await self._update(span, revive=True)
        except RowFault as fault:
            return fault
        self._updated |= set(updated)
        self._revived |= set(revived)
        return None

    async def _update(self, span: tuple[int, int] | None, *, revive: bool) -> list[int]:
        """Overwrite what differs, note what was there, return the rows that changed something."""
        if revive and self._merging.on_deleted != "revive":
            return []
        columns = self._overwritten()
        if not revive and self._merging.update is not None:
            columns = [name for name in columns if name in self._merging.update]
        if not columns and not revive:
            return []
        sql, binds = self._merging.journal.sql("changed", UPDATE if not revive else REVIVE)
        told = await self._run(
            f"WITH changed AS ({self._update_sql(columns, span, revive=revive)}), "
            f"noted AS ({sql}) SELECT row_no FROM changed",
            **binds,
        )
        return list(told.scalars())

    def _overwritten(self) -> list[str]:
        """The columns that some row gives, but the primary key."""
        return [
            name
            for name in self._columns
            if name not in self._key and any(name in given for given in self._given)
        ]

    def _update_sql(
        self, columns: Sequence[str], span: tuple[int, int] | None, *, revive: bool
    ) -> str:
        """OFFSET 0 keeps the planner from computing twice what differs.

        The source has names of its own, so that the model's expressions mean the target's columns.
        """
        source = [f"s.{ROW_NO} AS row_no", "m.place", "m.deleted_at AS was_deleted_at"]
        source += [f"m.k{n}" for n in range(len(self._key))]
        values: dict[str, str] = {}
        for name in columns:
            old, new = self._old(name), f"n{self._number(name)}"
            source += [f"m.{old}", f"{self._new(name)} AS {new}"]
            source.append(f"{self._differs(name)} AS d{self._number(name)}")
            values[quote(name)] = f"n.{new}"
        source += [f"m.{self._old(name)}" for name in self._imaged if name not in columns]
        values |= self._on_update(columns)
        if revive:
            values["deleted_at"] = "NULL"
        where = [DELETED_MATCH if revive else LIVE_MATCH, f"NOT s.{HELD}"]
        if span is not None:
            where.append(f"s.{ROW_NO} >= {span[0]} AND s.{ROW_NO} < {span[1]}")
        changed = " OR ".join(f"n.d{self._number(name)}" for name in columns)
        keys = ", ".join(f"n.k{n}" for n in range(len(self._key)))
        shown, hidden = self._images(columns, revive=revive)
        return (
            f"UPDATE {self._facts.name} AS t "
            f"SET {', '.join(f'{name} = {value}' for name, value in values.items())} "
            f"FROM (SELECT {', '.join(source)} FROM {MATCH} AS m "
            f"JOIN {STAGE} AS s ON s.{ROW_NO} = m.row_no WHERE {' AND '.join(where)} OFFSET 0) "
            f"AS n WHERE {self._same_row_as_met('t', 'n')} AND ({'true' if revive else changed}) "
            f"RETURNING n.row_no, jsonb_build_array({keys}) AS key, {shown} AS before, "
            f"{hidden} AS before_sensitive"
        )

    def _new(self, name: str) -> str:
        """A column's new value: a row that does not give it leaves it as it is."""
        giving = [number for number, given in enumerate(self._given) if name in given]
        if len(giving) == len(self._given):
            return f"s.{quote(name)}"
        listed = ", ".join(map(str, giving))
        return (
            f"CASE WHEN s.{GIVEN} IN ({listed}) THEN s.{quote(name)} ELSE m.{self._old(name)} END"
        )

    def _differs(self, name: str) -> str:
        old, new = f"m.{self._old(name)}", self._new(name)
        if self._facts.column(name).comparable:
            return f"{old} IS DISTINCT FROM {new}"
        return f"record_image_ne(ROW({old}), ROW({new}))"

    def _on_update(self, columns: Sequence[str]) -> dict[str, str]:
        """What the model changes with every update."""
        return {
            quote(name): sql for name, sql in self._facts.on_update.items() if name not in columns
        }

    def _images(self, columns: Sequence[str], *, revive: bool) -> tuple[str, str]:
        """SQL of what was in the columns that changed: what may be shown, and what may not."""
        parts: dict[bool, list[str]] = {True: [], False: []}
        told_by_row = self._facts.changes_on_update
        for name in self._imaged if told_by_row else columns:
            image = f"jsonb_build_object({_literal(name)}, n.{self._old(name)})"
            changed = f"n.d{self._number(name)}"
            if told_by_row:
                changed = f"record_image_ne(ROW(n.{self._old(name)}), ROW(t.{quote(name)}))"
            parts[name in self._merging.sensitive].append(
                f"CASE WHEN {changed} THEN {image} ELSE '{{}}' END"
            )
        if revive:
            parts[False].append("jsonb_build_object('deleted_at', n.was_deleted_at)")
        shown = " || ".join(parts[False]) or "CAST(NULL AS jsonb)"
        hidden = " || ".join(parts[True])
        return shown, f"nullif({hidden}, '{{}}')" if hidden else "CAST(NULL AS jsonb)"

    async def _insert_the_rest(self, met: set[int]) -> None:
        """Insert the rows in scope that meet nothing."""
        scope, sql = self._scope, self._scope_sql
        rest = (self._loaded if scope is None else self._loaded & scope) - met
        self._scope = frozenset(rest)
        if met:
            self._scope_sql += f" AND {ROW_NO} NOT IN (SELECT row_no FROM {MATCH})"
        if rest:
            await self._insert_scope()
        self._held.clear()
        self._scope, self._scope_sql = scope, sql

    async def _insert_scope(self) -> None:
        if await self._insert_many_directly():
            return
        self.sort()
        if not await self.insert_at_once():
            if not self._facts.has_triggers:
                await self.classify()
            await self.insert_halving(0, self._count)
        await self.explain_leftovers()

    async def _insert_many_directly(self) -> bool:
        """Insert the rows in scope by COPY where that is worth it and nothing stands against it."""
        rows = sorted(self._in_scope())
        if len(rows) < WORTH_A_COPY or not can_copy(self._facts, self._columns):
            return False
        part = self._batch.part(rows)
        done = await insert_directly(self._session, self._facts, self._columns, part)
        if done is None:
            return False
        self._inserted_directly.update(rows)
        self._direct_ranges += done.keys.ranges or ()
        return True

    def _settle(self, number: int, refusal: Refusal) -> None:
        if refusal.code == "unique_violation" and self._on_conflict == "update":
            self._clashing[number] = refusal
        else:
            super()._settle(number, refusal)

    async def _judge_clashes(self) -> None:
        """Refuse rows that clash although what they meet is what they met before; else Race."""
        if not self._clashing:
            return
        scope, sql = self._scope, self._scope_sql
        self._scope_sql = f" AND {ROW_NO} IN ({', '.join(map(str, self._clashing))})"
        keys = ", ".join(f"k{n}" for n in range(len(self._key)))
        pairs = " UNION ".join(self._match_sql(one, one.predicate) for one in self._met_by)
        new = await self._run(
            f"SELECT count(*) FROM (SELECT row_no, {keys} FROM ({pairs}) AS now "
            f"EXCEPT SELECT row_no, {keys} FROM {MATCH}) AS new"
        )
        if pairs and new.scalar_one():
            raise Race
        self._scope, self._scope_sql = scope, sql
        self._refused.update(self._clashing)
        self._clashing.clear()

    async def merged(self) -> Merged:
        done = await self.outcome()
        ranges = sorted([*self._direct_ranges, *(done.keys.ranges or ())])
        return Merged(
            Keys(ranges=ranges) if self._direct_ranges else done.keys,
            done.inserted | self._inserted_directly,
            done.skipped,
            done.refused,
            frozenset(self._updated),
            frozenset(self._unchanged),
            frozenset(self._revived),
        )


def _in_turn(rows: Iterable[int], groups: Iterable[Sequence[int]]) -> list[tuple[int, int]]:
    """Each row with its place among the rows that it is connected with by the groups."""
    parent: dict[int, int] = {}

    def root(row: int) -> int:
        while (above := parent.get(row, row)) != row:
            parent[row] = row = parent.get(above, above)
        return row

    for first, *others in groups:
        for other in others:
            parent[root(other)] = root(first)
    turns: dict[int, int] = defaultdict(int)
    numbered = []
    for row in rows:
        numbered.append((turns[root(row)], row))
        turns[root(row)] += 1
    return numbered


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
