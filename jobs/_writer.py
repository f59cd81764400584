"""The way of an input's chunks into one table: what a bulk write asks of it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncSession

from db.catalog import TableFacts
from db.ledger.audit import Journal
from db.ledger.job import Claim
from db.outcome import Written
from db.registry import Model
from jobs._mapping import Plan
from jobs._part import Part
from jobs._prepared import Prepared
from jobs._references import Known
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
class Writer(ABC):
    """Writes the chunks of one input, whose rows are prepared by a plan, one after the other."""

    claim: Claim
    model: Model
    facts: TableFacts
    plan: Plan
    columns: Sequence[str]

    @abstractmethod
    async def write(
        self, session: AsyncSession, ready: Ready, prepared: Prepared, turn: Turn
    ) -> Written:
        """Let the rows take effect in the session's transaction; the turn says from when on."""

    async def before(self, session: AsyncSession, prepared: Prepared) -> None:
        """Look up for a chunk what it is going to need; called when `looks_ahead`."""
        raise NotImplementedError(f"{type(self).__name__} looks nothing up ahead")

    @property
    def looks_ahead(self) -> bool:
        """Whether there is something to look up for the next chunk."""
        return False

    def is_apart(self, prepared: Prepared) -> bool:
        """Whether no row of the chunk that was asked about before can be one that these meet."""
        return False

    def overlaps(self, ready: Ready) -> bool:
        """Whether a chunk may begin before the one in front of it has committed.

        Its statements then wait for rows they clash with, and for no others. If it meets what that
        one changes it is a race; so it does not have to know what that one makes.
        """
        return False

    def journal(self, part: Part) -> Journal:
        """Behind the lines on what was inserted, into the table and into those it refers to."""
        first = 1 + len(self.plan.references)
        return Journal(self.claim, part.number, self.model.name, first)
