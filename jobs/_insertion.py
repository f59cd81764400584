"""Inserting one input chunk by chunk, in input order, with the verdicts of its rows."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db import bulk
from db.bulk import Inserted, OnConflict
from db.catalog import TableFacts, read_facts
from db.errors import Race, UnknownModel
from db.ledger import chunk
from db.ledger.audit import Entry
from db.ledger.chunk import OPENING, Receipt, Span
from db.ledger.verdict import RowVerdict, Verdict
from db.refusal import Refusal
from db.registry import Model
from jobs._errors import InputError, Rejected
from jobs._input import Input, Part
from jobs._mapping import Plan, Reference, Request, make_plan, natural_key
from jobs._preparation import Known, Prepared, Preparer
from jobs._run import ChunkedRun, ChunkEffect
from jobs._sources.csv import Position

STALE_TRIES = 20


@dataclass(frozen=True)
class Rules:
    """How large a chunk may be, what a clash means, and how many rejects there may be."""

    chunk_rows: int
    chunk_bytes: int
    on_conflict: OnConflict
    max_rejects: int | None


class _Stale(Exception):
    """A row that was looked up by its natural key is no longer what it was."""


class _TooManyRejects(Exception):
    """The chunk holds the one reject too many, at this position."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


@dataclass
class _Effect:
    """What became of the rows of a chunk, by their position."""

    prepared: Prepared
    inserted: Inserted

    @property
    def refused(self) -> dict[int, Refusal]:
        from_table = {
            self.prepared.positions[index]: why for index, why in self.inserted.refused.items()
        }
        return self.prepared.refused | from_table


@dataclass
class Insertion:
    """One input on its way into one table, from the position that is next."""

    run: ChunkedRun
    rules: Rules
    model: Model
    input: Input
    facts: TableFacts
    plan: Plan
    preparer: Preparer
    keys: Mapping[Reference, sa.Column[Any]]
    position: Position
    rejected: int

    @classmethod
    async def begin(
        cls, run: ChunkedRun, rules: Rules, request: Request, model: Model, source: Input
    ) -> "Insertion":
        """Check the input against the model before any row is touched, and find where to go on."""
        facts = await run.read(lambda session: read_facts(session, model.table))
        plan = make_plan(request, source.columns, model.name, model.create, facts)
        keys = {one: await _key_column(run, one) for one in plan.references}
        await _open(run, source)
        last = await run.read(lambda session: chunk.last_receipt(session, run.claim.job_id))
        tally = await run.read(lambda session: chunk.tally(session, run.claim.job_id))
        return cls(
            run,
            rules,
            model,
            source,
            facts,
            plan,
            Preparer(model, plan, facts),
            keys,
            source.data_start if last is None or last.chunk_no == OPENING else _behind(last),
            tally.counts.get(Verdict.REJECTED, 0),
        )

    def _parts(self) -> Iterator[Part]:
        return self.input.parts(self.rules.chunk_rows, self.rules.chunk_bytes, self.position)

    async def insert_all(self) -> None:
        """Insert the chunks that are missing; Rejected when there are too many rejects."""
        if self._too_many(self.rejected):
            self._give_up()
        async with aclosing(self._prepared_ahead()) as chunks:
            async for part, prepared, known in chunks:
                receipt = await self._commit(part, prepared, known)
                self.position = _behind(receipt)
                self.rejected += receipt.counts.get(Verdict.REJECTED, 0)
                if self._too_many(self.rejected):
                    break
        if self._too_many(self.rejected):
            self._give_up()

    def _too_many(self, rejected: int) -> bool:
        return self.rules.max_rejects is not None and rejected > self.rules.max_rejects

    async def _prepared_ahead(self) -> AsyncGenerator[tuple[Part, Prepared, Known], None]:
        """Prepare one chunk while the one before is being committed."""
        parts = self._parts()
        ahead = asyncio.create_task(self._next(parts))
        try:
            while (chunk_ready := await ahead) is not None:
                ahead = asyncio.create_task(self._next(parts))
                yield chunk_ready
        finally:
            await asyncio.wait([ahead])
            if not ahead.cancelled():
                ahead.exception()

    async def _next(self, parts: Iterator[Part]) -> tuple[Part, Prepared, Known] | None:
        part = await asyncio.to_thread(next, parts, None)
        if part is None:
            return None
        known = await self._look_up(part)
        return part, await asyncio.to_thread(self.preparer.prepare, part.rows, known), known

    async def _look_up(self, part: Part) -> Known:
        wanted = self.preparer.wanted_keys(part.rows)
        if not any(wanted.values()):
            return {one.field: {} for one in wanted}
        return await self.run.read(lambda session: self._ids(session, wanted))

    async def _ids(self, session: AsyncSession, wanted: Mapping[Reference, set[str]]) -> Known:
        """The ids of live rows by natural key."""
        found: dict[str, dict[str, Any]] = {}
        for reference, values in wanted.items():
            column = self.keys[reference]
            identity = column.table.c[reference.target]
            [convert] = bulk.bind_processors(column.table, [column.name])
            keys = sorted(map(convert, values) if convert else values)
            # one parameter however many keys; not of the column's length, to which a cast cuts
            these = sa.bindparam(None, keys, sa.ARRAY(sa.Text))
            query = sa.select(column, identity).where(column == sa.any_(these))
            if "deleted_at" in column.table.c:
                query = query.where(column.table.c.deleted_at.is_(None))
            found[reference.field] = {row[0]: row[1] for row in await session.execute(query)}
        return found

    async def _commit(self, part: Part, prepared: Prepared, known: Known) -> Receipt:
        for _ in range(STALE_TRIES):
            await asyncio.to_thread(self.input.unchanged)
            try:
                work = partial(self._work, part=part, prepared=prepared, known=known)
                return await self.run.commit_chunk(part.number, part.span, work)
            except _Stale:
                known = await self._look_up(part)
                prepared = await asyncio.to_thread(self.preparer.prepare, part.rows, known)
        raise InputError(
            f"the rows that chunk {part.number} refers to changed {STALE_TRIES} times while it was "
            "imported; run the import when they are at rest"
        )

    async def _work(
        self, session: AsyncSession, part: Part, prepared: Prepared, known: Known
    ) -> ChunkEffect:
        await self._still_known(session, known)
        try:
            async with session.begin_nested():
                effect = await self._insert(session, prepared)
                self._stop_at_limit(effect)
        except _TooManyRejects as stop:
            effect = await self._insert(session, prepared.until(stop.position + 1))
            if not self._too_many(self.rejected + len(effect.refused)):
                raise Race from None  # what stood in the way of a row is gone by now
        return self._effect(part, effect, prepared.filtered)

    async def _still_known(self, session: AsyncSession, known: Known) -> None:
        wanted = {one: set(known[one.field]) for one in self.plan.references}
        if any(wanted.values()) and await self._ids(session, wanted) != known:
            raise _Stale

    async def _insert(self, session: AsyncSession, prepared: Prepared) -> _Effect:
        inserted = await bulk.insert_rows(
            session,
            self.facts,
            self.preparer.columns,
            prepared.records,
            self.rules.on_conflict,
        )
        return _Effect(prepared, inserted)

    def _stop_at_limit(self, effect: _Effect) -> None:
        refused = sorted(effect.refused)
        if self.rules.max_rejects is not None and self._too_many(self.rejected + len(refused)):
            raise _TooManyRejects(refused[self.rules.max_rejects - self.rejected])

    def _effect(self, part: Part, effect: _Effect, filtered: int) -> ChunkEffect:
        refused = effect.refused
        skipped = len(effect.inserted.skipped)
        inserted = len(effect.inserted.inserted)
        counts = {
            Verdict.INSERTED: inserted,
            Verdict.SKIPPED: skipped,
            Verdict.REJECTED: len(refused),
            Verdict.NOT_REACHED: len(part.rows) - filtered - inserted - skipped - len(refused),
        }
        entry = Entry("insert", self.model.name, inserted, effect.inserted.keys)
        return ChunkEffect(
            Receipt(part.number, part.span, filtered, _without_zeros(counts)),
            [_row_verdict(part, position, why) for position, why in sorted(refused.items())],
            entry if inserted else None,
        )

    def _give_up(self) -> NoReturn:
        raise Rejected(
            f"{self.rejected} rows were rejected and at most {self.rules.max_rejects} may be; the "
            "rows behind were not reached, those inserted before stay: see `bulwark rejects`"
        )

    async def count_the_rest(self) -> None:
        """Commit, as one last chunk to the end of the input, that its rows were not reached."""
        if self.position.byte >= self.input.text_bytes:
            return
        part, filtered = await asyncio.to_thread(self._rest)
        counts = _without_zeros({Verdict.NOT_REACHED: part.span.rows - filtered})
        receipt = Receipt(part.number, part.span, filtered, counts)
        await self.run.commit_chunk(part.number, part.span, _already(ChunkEffect(receipt)))

    def _rest(self) -> tuple[Part, int]:
        at = self.position
        rows = filtered = 0
        next_line = at.line
        for part in self._parts():
            rows += part.span.rows
            filtered += self.preparer.count_filtered(part.rows)
            next_line = part.span.next_line
        span = Span(at.row, rows, at.byte, self.input.text_bytes, at.line, next_line)
        return Part(at.chunk_no, span, ()), filtered


async def _key_column(run: ChunkedRun, reference: Reference) -> sa.Column[Any]:
    try:
        table = run.models.get(reference.table).table
    except UnknownModel as error:
        raise InputError(str(error)) from None
    facts = await run.read(lambda session: read_facts(session, table))
    return natural_key(table, facts, reference.key)


async def _open(run: ChunkedRun, source: Input) -> None:
    """Fix, at the first run, what the input is; refuse another one at a later run."""
    detail = {
        "fingerprint": source.fingerprint,
        "header": source.header,
        "text_bytes": source.text_bytes,
    }
    start = source.data_start
    span = Span(1, 0, 0, start.byte, 1, start.line)
    opening = await run.commit_chunk(
        OPENING, span, _already(ChunkEffect(Receipt(OPENING, span, detail=detail)))
    )
    if (opening.detail or {}).get("fingerprint") != source.fingerprint:
        raise InputError(
            "the input is not the one that this job began with; what was committed stays, so "
            "import the new file as a new job with on_conflict skip"
        )


def _already(effect: ChunkEffect) -> Any:
    async def work(_: AsyncSession) -> ChunkEffect:
        return effect

    return work


def _behind(receipt: Receipt) -> Position:
    span = receipt.span
    return Position(receipt.chunk_no + 1, span.first_row + span.rows, span.end_byte, span.next_line)


def _row_verdict(part: Part, position: int, why: Refusal) -> RowVerdict:
    row = part.rows[position]
    return RowVerdict(
        row_no=part.span.first_row + position,
        chunk_no=part.number,
        line=row.line,
        verdict=Verdict.REJECTED,
        code=why.code,
        column=why.column,
        message=why.message,
        raw=row.raw,
    )


def _without_zeros(counts: Mapping[Verdict, int]) -> dict[str, int]:
    return {name.value: count for name, count in counts.items() if count}
