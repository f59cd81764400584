"""Inserting the rows of one chunk that are new and updating those that are there, as sets.

All rows that are met are locked first, in the order of their keys; then the staged rows are updated
or inserted by one statement each. Where it takes rounds, all of it ends as if the rows were applied
one by one. Whatever another transaction changes meanwhile is noticed, raises Race, and the chunk is
replayed.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from db.batch import Batch
from db.catalog import TableFacts, quote
from db.direct_copy import can_copy, draw_keys, insert_directly
from db.errors import Race
from db.ledger.audit import Keys
from db.ledger.verdict import Verdict
from db.meeting import DELETED, MeetingStage
from db.merging import Given, Merging
from db.outcome import Inserted
from db.overwriting import MATCH, OVERWRITE, REVIVE, Effect
from db.refusal import AMBIGUOUS, Refusal, RowFault, savepoint
from db.staging import ROW_NO

WAS_DELETED = "deleted_match"
WORTH_A_COPY = 100
"""Rows; for fewer, drawing keys and another COPY cost more than they save."""


@dataclass(frozen=True)
class Merged(Inserted):
    """What became of the rows; what was there before is in the journal."""

    updated: frozenset[int] = frozenset()
    unchanged: frozenset[int] = frozenset()
    revived: frozenset[int] = frozenset()

    @property
    def changed(self) -> Mapping[str, int]:
        counts = {OVERWRITE.action: len(self.updated), REVIVE.action: len(self.revived)}
        return {action: count for action, count in counts.items() if count}

    def taken(self) -> Mapping[Verdict, Collection[int]]:
        return {
            **super().taken(),
            Verdict.UPDATED: self.updated,
            Verdict.UNCHANGED: self.unchanged,
            Verdict.REVIVED: self.revived,
        }

    def wrote(self, field_name: str, update: frozenset[str] | None) -> Collection[int]:
        new = self.inserted | self.revived
        return new | self.updated if update is None or field_name in update else new


async def merge_rows(
    session: AsyncSession,
    facts: TableFacts,
    columns: Sequence[str],
    batch: Batch,
    given: Given,
    merging: Merging,
    may_lock: Callable[[], Awaitable[None]],
) -> Merged:
    """Apply rows in the session's transaction and say what became of each.

    What they meet is looked up at once; it is locked, and everything written, when `may_lock`
    returns. A value may be DEFAULT. Rows that meet several rows of the table, or not the version
    they expect, are refused with the verdict conflict. Raises Race, and whatever `insert_rows`
    raises.
    """
    stage = _Merge(session, facts, tuple(columns), given, merging)
    await stage.create()
    await stage.fill(batch)
    await stage.look()
    await may_lock()
    await stage.apply_in_rounds()
    merged = await stage.merged()
    return merged.accounting_for(len(batch))


class _Merge(MeetingStage):
    """A staging table whose rows update what they meet, or are inserted."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._drawn: dict[int, int] = {}
        self._inserted_directly: set[int] = set()
        self._direct_ranges: list[tuple[int, int]] = []
        self._clashing: dict[int, Refusal] = {}
        self._updated: set[int] = set()
        self._unchanged: set[int] = set()
        self._revived: set[int] = set()

    async def _before_rounds(self) -> None:
        """Rows that go in by rounds have keys in input order all the same."""
        if self._drawn_late:
            await self._draw_keys(sorted(self._loaded))

    async def _apply(self) -> None:
        """Let the rows in scope take effect, none of which has to do with another."""
        if self._merging.on_deleted != "insert":
            await self._prefer()
        met = await self._refuse_conflicts()
        if met:
            await self._update_met()
            await self._judge_clashes()
            done = self._updated | self._revived | self._refused.keys() | self._skipped
            self._unchanged |= (met & self._loaded) - done
        await self._insert_the_rest(met)
        await self._judge_clashes()

    async def _prefer(self) -> None:
        await self._keep_best_matches()
        if self._merging.on_deleted == "reject":
            text = "a row with this key was deleted; restore it, or import with --on-deleted revive"
            await self._put_aside(DELETED, Refusal(WAS_DELETED, text))

    async def _refuse_conflicts(self) -> set[int]:
        """Refuse what cannot take effect on what it meets; returns the rows that can."""
        if self._merging.on_conflict != "update":
            await self._run(f"DELETE FROM {MATCH} WHERE deleted_at IS NULL")
        met = await self._numbers(f"SELECT row_no FROM {MATCH}")
        refused: set[int] = set()
        if len(set(met)) < len(met):
            text = "it clashes with several rows that are there; give keys of one of them"
            several = f"SELECT row_no FROM {MATCH} GROUP BY row_no HAVING count(*) > 1"
            refused |= await self._put_aside(f"row_no IN ({several})", Refusal(AMBIGUOUS, text))
        if self._given.expected:
            refused |= await self._refuse_outdated()
        return set(met) - refused

    async def _update_met(self) -> None:
        """Update what the rows meet; when one is refused, tell first what can be told in sets."""
        if await self._update_all(None) is not None:
            if not self._facts.changes_on_update:  # what a trigger will make of a row is not known
                await self._classify_met()
            await self._update_halving(None)

    async def _classify_met(self) -> None:
        written = set(self._columns).intersection(*self._kinds)
        met = f"{ROW_NO} IN (SELECT row_no FROM {MATCH})"
        if self._merging.update is not None:
            written &= self._merging.update
            met = f"{ROW_NO} IN (SELECT row_no FROM {MATCH} WHERE deleted_at IS NULL)"
        await self._classify_written(written, met)

    async def _update_all(self, span: tuple[int, int] | None) -> RowFault | None:
        """Update and revive what the rows of a span meet; or do nothing, and return the fault."""
        try:
            async with savepoint(self._session):
                updated = await self._update(span, OVERWRITE)
                revived = await self._update(span, REVIVE)
        except RowFault as fault:
            return fault
        self._updated |= set(updated)
        self._revived |= set(revived)
        return None

    async def _update(self, span: tuple[int, int] | None, effect: Effect) -> list[int]:
        """Overwrite what differs, note what was there, return the rows that changed something."""
        if effect is REVIVE and self._merging.on_deleted != "revive":
            return []
        columns = self._sql.columns
        if effect is OVERWRITE and self._merging.update is not None:
            columns = [name for name in columns if name in self._merging.update]
        if not columns and effect is OVERWRITE:
            return []
        return await self._noting(self._sql.update(columns, span, effect), effect.action)

    async def _insert_the_rest(self, met: set[int]) -> None:
        """Insert the rows in scope that meet nothing."""
        rest = frozenset(self._in_scope() - met)
        unmet = f"{ROW_NO} NOT IN (SELECT row_no FROM {MATCH})" if met else "true"
        if rest:
            with self._narrowed(unmet, rest):
                await self._insert_scope()
        self._held.clear()

    async def _insert_scope(self) -> None:
        rows = sorted(self._in_scope())
        if self._drawn_late:
            await self._draw_keys(rows)
        if await self._insert_many_directly(rows):
            return
        if self._drawn_late:
            await self._set(quote(self._drawn_late), {row: self._drawn[row] for row in rows})
        self.sort()
        if not await self.insert_at_once():
            if not self._facts.has_triggers:
                await self.classify()
            await self.insert_halving(0, self._count)
        await self.explain_leftovers()

    async def _draw_keys(self, rows: Sequence[int]) -> None:
        """Draw keys for rows, in input order, that have none."""
        keyless = [row for row in rows if row not in self._drawn]
        keys = await draw_keys(self._session, self._facts, self._columns, len(keyless))
        self._drawn.update(zip(keyless, keys or (), strict=False))

    async def _insert_many_directly(self, rows: Sequence[int]) -> bool:
        """Insert the rows by COPY where that is worth it and nothing stands against it."""
        if len(rows) < WORTH_A_COPY or not can_copy(self._facts, self._columns):
            return False
        keys = [self._drawn[row] for row in rows] if self._drawn_late else None
        part = self._batch.part(rows)
        done = await insert_directly(self._session, self._facts, self._columns, part, keys)
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
        with self._narrowed(f"{ROW_NO} = ANY(:clashing)", clashing=list(self._clashing)):
            if await self._met_otherwise():
                raise Race
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
