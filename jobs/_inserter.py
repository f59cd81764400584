"""Writing the rows of a chunk: directly where nothing stands against it, else staged."""

from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncSession

from db import bulk
from db.direct_copy import can_copy, draw_keys, insert_directly
from db.ledger.audit import Journal
from db.merging import Given, Merging, OnDeleted
from db.outcome import Inserted
from db.registry import Model
from db.staging import OnConflict
from db.unique_values import UniqueValues, disjoint, unique_values
from db.upsert import merge_rows
from jobs._part import Part
from jobs._prepared import Prepared
from jobs._turn import Turn
from jobs._writer import Ready, Writer


@dataclass(frozen=True)
class Clashes:
    """What becomes of rows that meet others: rejected, skipped, or what is there is changed."""

    on_conflict: OnConflict = "reject"
    on_deleted: OnDeleted = "insert"
    update: frozenset[str] | None = None
    expects_version: bool = False

    @property
    def looks_first(self) -> bool:
        """Whether a row that PostgreSQL would take may still have to be treated otherwise."""
        return self.on_deleted != "insert" or self.expects_version

    @property
    def merges(self) -> bool:
        """Whether rows that are there may be changed."""
        return self.looks_first or self.on_conflict == "update"

    def merging(self, model: Model, journal: Journal) -> Merging:
        return Merging(
            self.on_conflict, journal, self.on_deleted, self.update, model.sensitive_columns
        )


@dataclass
class Inserter(Writer):
    """Writes rows that are new, or meet others.

    Keys that were drawn ahead hold for one `epoch`: once a chunk has got keys that were drawn
    later, those of the chunks behind it would come before them.
    """

    clashes: Clashes = Clashes()
    promising: bool = True
    in_front: UniqueValues | None = None
    epoch: int = 0

    @property
    def goes_directly(self) -> bool:
        """Whether the next rows are expected to go in without a look at what is there."""
        looks = self.clashes.looks_first or not self.promising
        return not looks and can_copy(self.facts, self.columns)

    @property
    def looks_ahead(self) -> bool:
        return self.goes_directly

    async def before(self, session: AsyncSession, prepared: Prepared) -> None:
        """Draw the keys of a chunk's rows."""
        prepared.epoch, count = self.epoch, len(prepared.records)
        prepared.keys = await draw_keys(session, self.facts, self.columns, count)

    def is_apart(self, prepared: Prepared) -> bool:
        if not self.clashes.merges:
            return False
        in_front, self.in_front = self.in_front, None
        if not prepared.unknown:  # rows that may be valid once what they name is there
            self.in_front = unique_values(self.facts, self.columns, prepared.records)
        return disjoint(in_front, self.in_front)

    def overlaps(self, ready: Ready) -> bool:
        facts, clashes = self.facts, self.clashes
        if facts.deferrable or facts.own_parent:
            return False
        finds_out = clashes.merges and not clashes.expects_version and not facts.has_triggers
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
        facts, columns, batch = self.facts, self.columns, prepared.batch
        if not self.clashes.merges:
            return await bulk.insert_rows(session, facts, columns, batch, self.clashes.on_conflict)
        given = Given(frozenset(self.plan.given), prepared.given, prepared.expected)
        merging = self.clashes.merging(self.model, self.journal(part))
        return await merge_rows(session, facts, columns, batch, given, merging, turn.may_look)
