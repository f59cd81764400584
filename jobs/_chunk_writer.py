"""Writing the rows of a chunk: directly where nothing stands against it, else staged."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncSession

from db import bulk
from db.catalog import TableFacts
from db.direct_copy import can_copy, draw_keys, insert_directly
from db.ledger.audit import Journal
from db.ledger.job import Claim
from db.merging import Terms
from db.outcome import Inserted
from db.registry import Model
from db.unique_values import UniqueValues, disjoint, unique_values
from db.upsert import merge_rows
from jobs._mapping import Plan
from jobs._part import Part
from jobs._preparation import Known, Prepared
from jobs._rules import Rules
from jobs._turn import Turn


@dataclass(frozen=True)
class Ready:
    """A part of the input that can be written, and the rows it refers to as they were found.

    It is `apart` if no row of the chunk in front can be one that its rows meet.
    """

    part: Part
    prepared: Prepared
    known: Known
    apart: bool = False


@dataclass
class ChunkWriter:
    """The way of an input's chunks into one table.

    Keys that were drawn ahead hold for one `epoch`: once a chunk has got keys that were drawn
    later, those of the chunks behind it would come before them.
    """

    claim: Claim
    rules: Rules
    model: Model
    facts: TableFacts
    plan: Plan
    columns: Sequence[str]
    promising: bool = True
    in_front: UniqueValues | None = None
    epoch: int = 0

    @property
    def goes_directly(self) -> bool:
        """Whether the next rows are expected to go in without a look at what is there."""
        looks = self.rules.looks_first or not self.promising
        return not looks and can_copy(self.facts, self.columns)

    async def draw_keys(self, session: AsyncSession, count: int) -> Sequence[int] | None:
        """Keys for so many rows of the next chunk."""
        return await draw_keys(session, self.facts, self.columns, count)

    def is_apart(self, prepared: Prepared) -> bool:
        """Whether no row of the chunk that was asked about before can be one that these meet."""
        if not self.rules.merges:
            return False
        in_front, self.in_front = self.in_front, None
        if not prepared.unknown:  # rows that may be valid once what they name is there
            self.in_front = unique_values(self.facts, self.columns, prepared.records)
        return disjoint(in_front, self.in_front)

    def overlaps(self, ready: Ready) -> bool:
        """Whether a chunk may begin before the one in front of it has committed.

        Its statements then wait for rows they clash with, and for no others. If it meets what that
        one changes it is a race; so it does not have to know what that one makes.
        """
        facts, rules = self.facts, self.rules
        if facts.deferrable or facts.own_parent:
            return False
        finds_out = rules.merges and not rules.expects_version and not facts.has_triggers
        return self.goes_directly or (finds_out and ready.apart)

    async def write(
        self, session: AsyncSession, ready: Ready, prepared: Prepared, turn: Turn
    ) -> Inserted:
        """Insert at once what nothing stands against; where rows met others last time, staged."""
        if self.goes_directly:
            await turn.may_write()
        if self.goes_directly:
            copied = await self._copy(session, prepared)
            if copied is not None:
                return copied
            await turn.may_look()
        elif not self.overlaps(ready):
            await turn.may_look()
        staged = await self._stage(session, ready.part, prepared, turn)
        self.epoch += 1
        self.promising = len(staged.inserted) == len(prepared.batch)
        return staged

    async def _copy(self, session: AsyncSession, prepared: Prepared) -> Inserted | None:
        keys = prepared.keys if prepared.epoch == self.epoch else None
        copied = await insert_directly(session, self.facts, self.columns, prepared.batch, keys)
        if copied is None or keys is None:
            self.epoch += 1
        return copied

    async def _stage(
        self, session: AsyncSession, part: Part, prepared: Prepared, turn: Turn
    ) -> Inserted:
        facts, columns, batch, rules = self.facts, self.columns, prepared.batch, self.rules
        if not rules.merges:
            return await bulk.insert_rows(session, facts, columns, batch, rules.on_conflict)
        terms = Terms(frozenset(self.plan.given), prepared.given, prepared.expected)
        merging = rules.merging(self.model, self._journal(part))
        return await merge_rows(session, facts, columns, batch, terms, merging, turn.may_look)

    def _journal(self, part: Part) -> Journal:
        """Behind the lines on what was inserted, into the table and into those it refers to."""
        first = 1 + len(self.plan.references)
        return Journal(self.claim, part.number, self.model.name, first)
