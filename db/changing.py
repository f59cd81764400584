"""Changing rows that are named by a key, as sets: overwritten, deleted softly, or restored.

All rows that are named are locked first, in the order of their primary keys. Where what one row
makes may matter to another they take effect in rounds, so that all of it ends as if they were
applied one by one. Whatever another transaction changes meanwhile is looked up again under the
locks, or raises Race, and the chunk is replayed.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db.batch import Batch
from db.catalog import TableFacts, UniqueIndex, quote
from db.dependents import Dependents, DependentStage
from db.ledger.audit import Journal
from db.ledger.verdict import Verdict
from db.matching import in_turn
from db.meeting import DELETED, LIVE
from db.merging import Given
from db.outcome import Written
from db.overwriting import DELETE, GIVEN, MATCH, OVERWRITE, RESTORE, Effect
from db.refusal import NOT_THERE, Refusal, RowFault, savepoint
from db.staging import ROW_NO, STAGE
from db.unique_values import touched_by

NO_DEPENDENTS = Dependents()
_VERDICTS = {
    OVERWRITE: Verdict.UPDATED,
    DELETE: Verdict.DELETED,
    RESTORE: Verdict.RESTORED,
}


@dataclass(frozen=True)
class Change:
    """What is to happen to rows of a table, and by which columns they are named.

    Rows that do not fulfil the condition `only` are left as they are.
    """

    effect: Effect
    key: tuple[str, ...]
    journal: Journal
    table: sa.Table
    sensitive: frozenset[str] = frozenset()
    dependents: Dependents = NO_DEPENDENTS
    only: sa.ColumnElement[bool] | None = None


@dataclass(frozen=True)
class Changed(Written):
    """Rows that were there: changed by the effect, or left as they are.

    `along` are the rows of other tables that were changed with them.
    """

    effect: Effect
    rows: frozenset[int] = frozenset()
    unchanged: frozenset[int] = frozenset()
    refused: dict[int, Refusal] = field(default_factory=dict)
    along: Mapping[str, int] = field(default_factory=dict)

    @property
    def changed(self) -> Mapping[str, int]:
        return {self.effect.action: len(self.rows)} if self.rows else {}

    @property
    def changed_along(self) -> Mapping[str, Mapping[str, int]]:
        return {table: {self.effect.action: rows} for table, rows in self.along.items() if rows}

    def taken(self) -> Mapping[Verdict, Collection[int]]:
        return {_VERDICTS[self.effect]: self.rows, Verdict.UNCHANGED: self.unchanged}


async def change_rows(
    session: AsyncSession,
    facts: TableFacts,
    columns: Sequence[str],
    batch: Batch,
    given: Given,
    change: Change,
    may_lock: Callable[[], Awaitable[None]],
) -> Changed:
    """Change the rows that are named, in the session's transaction, and say what became of each.

    They are looked up at once; they are locked, and everything is written, when `may_lock`
    returns. A row that names none is refused with the verdict missing. Raises Race.
    """
    stage = _Change(session, facts, tuple(columns), given, change)
    await stage.create()
    await stage.fill(batch)
    await stage.look()
    await may_lock()
    await stage.apply_in_rounds()
    return stage.changed().accounting_for(len(batch))


class _Change(DependentStage):
    """A staging table whose rows name rows of the table."""

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
        self._written = [name for name in self._sql.columns if name not in change.key]
        self._changed: set[int] = set()
        self._unchanged: set[int] = set()
        self._clashing: dict[int, Refusal] = {}
        self._dependents = change.dependents
        self._taken_along = {}
        self._places = {}
        self._changed_along = Counter()

    # Matching

    async def _match(self) -> None:
        await self._note("t.deleted_at IS NULL" if self._sql.soft else "true", "OFFSET 0")
        if self._effect is not OVERWRITE:
            await self._note(f"t.{DELETED}", "")
            await self._keep_best_matches()

    async def _note(self, theirs: str, offset: str) -> None:
        """Note the rows of the table that the rows in scope name.

        OFFSET 0 makes it a look-up for each row; of deleted rows there is no index by natural key.
        """
        ours = ", ".join(f"{quote(name)} AS u{n}" for n, name in enumerate(self._change.key))
        same = " AND ".join(f"t.{quote(name)} = s.u{n}" for n, name in enumerate(self._change.key))
        await self._run(
            f"INSERT INTO {MATCH} SELECT s.row_no, o.* FROM "
            f"(SELECT {ROW_NO} AS row_no, {ours} FROM {STAGE} WHERE true{self._scope_sql}) AS s "
            f"CROSS JOIN LATERAL (SELECT {self._sql.picked('t')} FROM {self._facts.name} AS t "
            f"WHERE {theirs} AND {same} {offset}) AS o"
        )
        if not self._scope_bind:
            await self._run(f"ANALYZE {MATCH}")

    async def lock(self) -> bool:
        """Lock what is named; before that, in the order of locks, what has to live beside it."""
        if self._effect is RESTORE:
            await self._hold_parents()
        as_noted = await super().lock()
        if self._effect is RESTORE and not as_noted:
            await self._hold_parents()
        return as_noted

    # Rounds

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
            f"t.{key} {_equals(index)} n.{place}"
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

    # Taking effect

    async def _apply(self) -> None:
        met = set(await self._numbers(f"SELECT row_no FROM {MATCH}"))
        missing = self._in_scope() - met
        if missing:
            self._refused.update(dict.fromkeys(missing, self._not_there()))
            self._loaded -= missing
        if self._given.expected:
            await self._refuse_outdated()
        if self._change.only is not None:
            await self._leave_others(self._change.only)
        if self._effect is not OVERWRITE:
            await self._judge_dependents()
        before = set(self._changed)
        if self._written or self._effect is not OVERWRITE:
            await self._update_met()
        await self._explain_clashes()
        await self._take_along(self._changed - before)
        done = self._changed | self._refused.keys()
        self._unchanged |= (met & self._loaded) - done

    async def _judge_dependents(self) -> None:
        """Refuse the rows that may not go, or come back, because of others."""
        await self._gather()
        if self._effect is DELETE:
            await self._refuse_referenced()
        else:
            await self._refuse_orphans()
            await self._refuse_taken_values()
        await self._hold(self._refused.keys())

    async def _leave_others(self, only: sa.ColumnElement[bool]) -> None:
        """Take out of MATCH the rows that do not fulfil a condition."""
        columns = [self._change.table.c[name] for name in self._key]
        match = sa.table(MATCH, *(sa.column(name) for name in ("row_no", *self._sql.keys)))
        own = (match.c[key] == one for key, one in zip(self._sql.keys, columns, strict=True))
        fulfilled = sa.exists().where(*own, only)
        await self._session.execute(sa.delete(match).where(~fulfilled))

    def _not_there(self) -> Refusal:
        keys = ", ".join(self._change.key)
        live = "live row" if self._effect is OVERWRITE and self._sql.soft else "row"
        text = f"no {live} of {self._facts.table_name} has this {keys}"
        return Refusal(NOT_THERE, text, keys)

    async def _update_met(self) -> None:
        """Update what is named; when a row is refused, tell first what can be told in sets."""
        if await self._update_all(None) is None:
            return
        if not self._facts.changes_on_update:  # what a trigger will make of a row is not known
            written = set(self._written).intersection(*self._kinds)
            await self._classify_written(written, f"{ROW_NO} IN (SELECT row_no FROM {MATCH})")
        await self._update_halving(None)

    async def _update_all(self, span: tuple[int, int] | None) -> RowFault | None:
        sql = self._sql.update(self._written, span, self._effect)
        try:
            async with savepoint(self._session):
                self._changed |= set(await self._noting(sql, self._effect.action))
        except RowFault as fault:
            return fault
        return None

    def _settle(self, number: int, refusal: Refusal) -> None:
        if refusal.code == "unique_violation":
            self._clashing[number] = refusal
        super()._settle(number, refusal)

    async def _explain_clashes(self) -> None:
        """Say of rows that cannot be restored which row has taken what is unique."""
        if self._effect is RESTORE:
            for index in self._facts.unique_indexes:
                if self._clashing and self._is_foreseeable(index):
                    await self._name_takers(index)
        self._clashing.clear()

    async def _name_takers(self, index: UniqueIndex) -> None:
        same = " AND ".join(f"t.{key} {_equals(index)} d.{key}" for key in index.keys)
        ours = ", ".join(f"m.{key}::text" for key in self._sql.keys)
        theirs = ", ".join(f"t.{quote(name)}::text" for name in self._key)
        rows = await self._run(
            f"SELECT m.row_no, concat_ws(', ', {ours}), concat_ws(', ', {theirs}) "
            f"FROM {MATCH} AS m "
            f"JOIN {self._facts.name} AS d ON {self._sql.same_row_as_met('d', 'm')} "
            f"JOIN {self._facts.name} AS t ON {same} AND t.deleted_at IS NULL "
            "WHERE m.row_no = ANY(:rows)",
            rows=list(self._clashing),
        )
        names, keys = ", ".join(self._key), ", ".join(index.keys)
        for found in rows:
            row, own, other = tuple(found)
            text = f"{names} {own} has the {keys} that {names} {other} has by now ({index.name})"
            self._refused[row] = Refusal("unique_violation", text, keys)
            self._clashing.pop(row, None)

    def changed(self) -> Changed:
        """What became of the rows, once nothing more is to be changed."""
        changed, unchanged = frozenset(self._changed), frozenset(self._unchanged)
        along = dict(self._changed_along)
        return Changed(self._effect, changed, unchanged, self._refused, along)


def _places(index: UniqueIndex) -> list[str]:
    return [f"u{n}" for n in range(len(index.keys))]


def _filled(index: UniqueIndex) -> str:
    """That a row takes part in the index."""
    if index.nulls_equal:
        return "true"
    return " AND ".join(f"{place} IS NOT NULL" for place in _places(index))


def _equals(index: UniqueIndex) -> str:
    return "IS NOT DISTINCT FROM" if index.nulls_equal else "="
