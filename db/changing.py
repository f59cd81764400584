"""Changing rows that are named by a key, as sets: overwritten, deleted softly, or restored.

All rows that are named are locked first, in the order of their primary keys. Where what one row
makes may matter to another they take effect in rounds, so that all of it ends as if they were
applied one by one. Whatever another transaction changes meanwhile is looked up again under the
locks, or raises Race, and the chunk is replayed.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db.batch import Batch
from db.catalog import TableFacts, UniqueIndex, quote
from db.change import Change, Changed
from db.change_rounds import RoundStage, equals
from db.meeting import DELETED
from db.merging import Given
from db.overwriting import MATCH, OVERWRITE, RESTORE
from db.refusal import NOT_THERE, Refusal, RowFault, savepoint
from db.staging import ROW_NO, STAGE


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


class _Change(RoundStage):
    """A staging table whose rows name rows of the table."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._changed: set[int] = set()
        self._unchanged: set[int] = set()
        self._clashing: dict[int, Refusal] = {}

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
        same = " AND ".join(f"t.{key} {equals(index)} d.{key}" for key in index.keys)
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
