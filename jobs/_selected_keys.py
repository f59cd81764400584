"""The rows that a filter selects, fixed when the job first runs: their keys, as a spooled input."""

import asyncio
import csv
import hashlib
import io
from collections.abc import AsyncIterator

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger import spool
from db.ledger.chunk import SELECTION, Receipt, Span
from db.overwriting import Effect
from db.registry import Model
from jobs._errors import InputError
from jobs._filter import Filter
from jobs._input import Input, Spooled, open_spooled
from jobs._run import ChunkedRun, ChunkEffect
from jobs._sources.spool import pack_part

PART_BYTES = 1024 * 1024
PAGE_ROWS = 10_000
_NO_ROWS = Span(1, 0, 0, 0, 1, 1)


async def open_selected(run: ChunkedRun, model: Model, found: Filter, effect: Effect) -> Input:
    """The keys of the rows that fulfilled the filter when it was first asked for.

    Only rows that the effect can come over are selected: live ones, or deleted ones.
    """
    if not model.table.primary_key.columns:
        raise InputError(f"{model.name} has no primary key, so no filter can tell its rows")

    async def select(session: AsyncSession) -> ChunkEffect:
        text = _Text()
        await spool.write_parts(
            session, run.claim.job_id, text.parts(session, model, found, effect)
        )
        detail = text.source.model_dump()
        return ChunkEffect(Receipt(SELECTION, _NO_ROWS, detail=detail))

    receipt = await run.commit_chunk(SELECTION, _NO_ROWS, select)
    source = Spooled.model_validate(receipt.detail)
    return await asyncio.to_thread(open_spooled, run, source, asyncio.get_running_loop())


class _Text:
    """The keys as CSV, in their order, and what is known of it once it is written."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._size = 0
        self._columns: tuple[str, ...] = ()

    @property
    def source(self) -> Spooled:
        return Spooled(
            type="spooled",
            name="the rows that the filter selected",
            sha256=self._digest.hexdigest(),
            raw_bytes=self._size,
            text_bytes=self._size,
            compression="none",
            part_bytes=PART_BYTES,
            format="csv",
            encoding="utf-8",
            delimiter=",",
            columns=self._columns,
        )

    async def parts(
        self, session: AsyncSession, model: Model, found: Filter, effect: Effect
    ) -> AsyncIterator[bytes]:
        """The packed parts, each but the last of the same size."""
        held = b""
        async for block in self._blocks(session, model, found, effect):
            self._digest.update(block)
            self._size += len(block)
            held += block
            while len(held) >= PART_BYTES:
                yield await asyncio.to_thread(pack_part, held[:PART_BYTES], "none")
                held = held[PART_BYTES:]
        if held:
            yield await asyncio.to_thread(pack_part, held, "none")

    async def _blocks(
        self, session: AsyncSession, model: Model, found: Filter, effect: Effect
    ) -> AsyncIterator[bytes]:
        keys = list(model.table.primary_key.columns)
        self._columns = tuple(key.name for key in keys)
        yield _written([self._columns])
        query = sa.select(*(sa.cast(key, sa.Text) for key in keys)).where(found.condition)
        if "deleted_at" in model.table.c:
            deleted_at = model.table.c.deleted_at
            query = query.where(deleted_at.is_(None) == effect.to_live)
        rows = await session.stream(query.order_by(*keys))
        async for page in rows.partitions(PAGE_ROWS):
            yield await asyncio.to_thread(_written, [tuple(row) for row in page])


def _written(rows: list[tuple[str, ...]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
