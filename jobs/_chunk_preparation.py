"""Parts of an input made ready to be written: what they refer to looked up, their rows prepared."""

import asyncio
from dataclasses import dataclass
from functools import partial

from sqlalchemy.ext.asyncio import AsyncSession

from jobs._parents import Created, Parents, Stale
from jobs._part import Part
from jobs._preparation import Preparer
from jobs._prepared import Prepared
from jobs._references import Known
from jobs._run import ChunkedRun
from jobs._writer import Ready, Writer


@dataclass(frozen=True)
class ChunkPreparer:
    """Prepares the chunks of one run for one writer.

    What they refer to is looked up in the session's transaction, if one is given, and otherwise
    in one of its own: who holds a connection must not wait for another.
    """

    run: ChunkedRun
    preparer: Preparer
    parents: Parents
    writer: Writer

    async def prepare(self, part: Part, session: AsyncSession | None = None) -> Ready:
        """Prepare a chunk that is written next."""
        known = await self._look_up(part, session)
        prepared = await asyncio.to_thread(self.preparer.prepare, part, known)
        return Ready(part, prepared, known)

    async def prepare_ahead(self, part: Part) -> Ready:
        """Prepare a chunk while others are written, with the keys that it is going to need.

        They are asked for in input order, since a writer compares each with the one in front.
        """
        known = await self._look_up(part)
        prepared = await asyncio.to_thread(self.preparer.validate, part, known)
        if self.writer.looks_ahead:
            await self.run.read(partial(self.writer.before, prepared=prepared))
        return await asyncio.to_thread(self._written_out, part, prepared, known)

    def _written_out(self, part: Part, prepared: Prepared, known: Known) -> Ready:
        _ = prepared.batch
        return Ready(part, prepared, known, self.writer.is_apart(prepared))

    async def _look_up(self, part: Part, session: AsyncSession | None = None) -> Known:
        wanted = self.preparer.wanted_keys(part)
        if not any(wanted.values()):
            return {one.field: {} for one in wanted}
        if session is not None:
            return await self.parents.ids(session, wanted)
        return await self.run.read(lambda session: self.parents.ids(session, wanted))

    async def require_known(self, session: AsyncSession, ready: Ready) -> None:
        """Raise Stale unless what the chunk refers to is still what was looked up."""
        wanted = {one: set(ready.known[one.field]) for one in self.parents.parents}
        if any(wanted.values()) and await self.parents.ids(session, wanted) != ready.known:
            raise Stale

    async def with_created(self, session: AsyncSession, ready: Ready, created: Created) -> Prepared:
        """Create the rows that are named and not there, and prepare the chunk with them."""
        if not ready.prepared.unknown:
            return ready.prepared
        new = await self.parents.create(session, ready.prepared.unknown, created)
        complete = {name: {**ids, **new.get(name, {})} for name, ids in ready.known.items()}
        return await asyncio.to_thread(self.preparer.prepare, ready.part, complete)
