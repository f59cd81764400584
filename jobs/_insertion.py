"""Inserting one input chunk by chunk, in input order, with the verdicts of its rows."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from sqlalchemy.ext.asyncio import AsyncSession

from db import bulk
from db.catalog import TableFacts, read_facts
from db.direct_copy import can_copy, draw_keys, insert_directly
from db.errors import Race
from db.ledger import chunk
from db.ledger.audit import Changes, Entry, Journal
from db.ledger.chunk import OPENING, Receipt, Span
from db.ledger.verdict import RowVerdict, Verdict
from db.merging import Merging, OnDeleted, Terms
from db.outcome import Inserted
from db.refusal import Refusal
from db.registry import Model
from db.staging import OnConflict
from db.unique_values import UniqueValues, disjoint, unique_values
from db.upsert import CONFLICTS, REVIVE, UPDATE, Merged, merge_rows
from jobs._errors import InputError, Rejected
from jobs._input import Input
from jobs._mapping import Plan, Reference, Request, make_plan, require_given
from jobs._parents import Created, Parents
from jobs._part import Part, Position
from jobs._preparation import Known, OnMissing, Prepared, Preparer
from jobs._run import ChunkedRun, ChunkEffect
from jobs._together import Stale, Together
from jobs._turn import Turn, in_turn

STALE_TRIES = 20


@dataclass(frozen=True)
class Rules:
    """How large a chunk may be, what becomes of rows that meet others, and how many rejects go."""

    chunk_rows: int
    chunk_bytes: int
    on_conflict: OnConflict
    max_rejects: int | None
    on_deleted: OnDeleted = "insert"
    on_missing: OnMissing = "reject"
    update: frozenset[str] | None = None
    expects_version: bool = False
    atomic: bool = False

    def rejects(self, counts: Mapping[str, int]) -> int:
        """How many rows count as rejected: where all must go in, those in conflict too."""
        conflicts = counts.get(Verdict.CONFLICT, 0) if self.atomic else 0
        return counts.get(Verdict.REJECTED, 0) + conflicts

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


class _TooManyRejects(Exception):
    """The chunk holds the one reject too many, at this position."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


@dataclass
class _Effect:
    """What became of the rows of a chunk, by their position."""

    prepared: Prepared
    written: Inserted

    @property
    def refused(self) -> dict[int, Refusal]:
        from_table = {
            self.prepared.positions[index]: why for index, why in self.written.refused.items()
        }
        return self.prepared.refused | from_table

    @property
    def rejected(self) -> list[int]:
        return [at for at, why in self.refused.items() if _verdict(why) == Verdict.REJECTED]

    @property
    def counts(self) -> dict[Verdict, int]:
        written, refused = self.written, len(self.refused)
        counts = {
            Verdict.INSERTED: len(written.inserted),
            Verdict.SKIPPED: len(written.skipped),
            Verdict.REJECTED: len(self.rejected),
            Verdict.CONFLICT: refused - len(self.rejected),
        }
        if isinstance(written, Merged):
            counts[Verdict.UPDATED] = len(written.updated)
            counts[Verdict.UNCHANGED] = len(written.unchanged)
            counts[Verdict.REVIVED] = len(written.revived)
        return counts

    def used(
        self,
        references: Sequence[Reference],
        columns: Sequence[str],
        update: frozenset[str] | None,
    ) -> dict[Reference, set[Any]]:
        """By reference, the ids that rows wrote into the table."""
        used: dict[Reference, set[Any]] = {}
        for one in references:
            written = set(self.written.inserted)
            if isinstance(self.written, Merged):
                written |= self.written.revived
                if update is None or one.field in update:
                    written |= self.written.updated
            at = columns.index(one.field)
            used[one] = {self.prepared.records[position][at] for position in written}
        return used

    def changes(self, table: str) -> Changes | None:
        """What the audit has to say, row by row, about rows that were there before."""
        if not isinstance(self.written, Merged):
            return None
        counts = {UPDATE: len(self.written.updated), REVIVE: len(self.written.revived)}
        told = {action: count for action, count in counts.items() if count}
        return Changes(table, told) if told else None


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
class Insertion:
    """One input on its way into one table, from the position that is next.

    Keys that were drawn ahead hold for one `epoch`: once a chunk has got keys that were drawn
    later, those of the chunks behind it would come before them.
    """

    run: ChunkedRun
    rules: Rules
    model: Model
    input: Input
    facts: TableFacts
    plan: Plan
    preparer: Preparer
    parents: Parents
    position: Position
    rejected: int
    promising: bool = True
    in_front: UniqueValues | None = None
    epoch: int = 0
    outside: Context = field(default_factory=copy_context)

    @classmethod
    async def begin(
        cls, run: ChunkedRun, rules: Rules, request: Request, model: Model, source: Input
    ) -> "Insertion":
        """Check the input against the model before any row is touched, and find where to go on."""
        facts = await run.read(lambda session: read_facts(session, model.table))
        plan = make_plan(request, source.columns, model.name, model.create, facts)
        if rules.update is not None:
            require_given(rules.update, plan, model.name)
        creatable = rules.on_missing == "create"
        parents = await Parents.find(run, facts, plan, creatable=creatable)
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
            Preparer(model, plan, facts, rules.on_missing),
            parents,
            source.data_start if last is None or last.chunk_no == OPENING else behind(last),
            rules.rejects(tally.counts),
        )

    def _parts(self) -> Iterator[Part]:
        return self.input.parts(self.rules.chunk_rows, self.rules.chunk_bytes, self.position)

    async def insert_all(self) -> None:
        """Insert the chunks that are missing; Rejected when there are too many rejects."""
        if self.too_many(self.rejected):
            self._give_up()
        if self.rules.atomic:
            if (receipt := await Together(self).insert_all()) is not None:
                self._count(receipt)
        else:
            await self._insert_in_turn()
        if self.too_many(self.rejected):
            self._give_up()

    async def _insert_in_turn(self) -> None:
        chunks = self.prepared()
        receipts = in_turn(chunks, self._commit, self.outside)
        async with aclosing(chunks), aclosing(receipts):
            async for receipt in receipts:
                self._count(receipt)
                if self.too_many(self.rejected):
                    break

    def _count(self, receipt: Receipt) -> None:
        self.position = behind(receipt)
        self.rejected += self.rules.rejects(receipt.counts)

    def too_many(self, rejected: int) -> bool:
        return self.rules.max_rejects is not None and rejected > self.rules.max_rejects

    async def prepared(self, session: AsyncSession | None = None) -> AsyncGenerator[Ready, None]:
        """The chunks that are missing, each prepared when it is asked for.

        What they refer to is looked up in the session's transaction, if one is given, and otherwise
        in one of its own: who holds a connection must not wait for another.
        """
        parts = self._parts()
        while (part := await asyncio.to_thread(next, parts, None)) is not None:
            if session is None:
                yield await self._prepare(part)
            else:
                known = await self._look_up(part, session)
                yield Ready(
                    part, await asyncio.to_thread(self.preparer.prepare, part, known), known
                )

    async def _prepare(self, part: Part) -> Ready:
        """Prepare a chunk, with the keys that it is going to need."""
        known = await self._look_up(part)
        prepared = await asyncio.to_thread(self.preparer.prepare, part, known)
        if self._goes_directly:
            epoch, count = self.epoch, len(prepared.batch)
            prepared.keys = await self.run.read(partial(self._draw_keys, count=count))
            prepared.epoch = epoch
        return Ready(part, prepared, known, await asyncio.to_thread(self._is_apart, prepared))

    def _is_apart(self, prepared: Prepared) -> bool:
        if not self.rules.merges:
            return False
        in_front, self.in_front = self.in_front, None
        if not prepared.unknown:  # rows that may be valid once what they name is there
            self.in_front = unique_values(self.facts, self.preparer.columns, prepared.records)
        return disjoint(in_front, self.in_front)

    @property
    def _goes_directly(self) -> bool:
        """Whether the next rows are expected to go in without a look at what is there."""
        looks = self.rules.looks_first or not self.promising
        return not looks and can_copy(self.facts, self.preparer.columns)

    def _overlaps(self, ready: Ready) -> bool:
        """Whether a chunk may begin before the one in front of it has committed.

        Its statements then wait for rows they clash with, and for no others. If it meets what that
        one changes it is a race; so it does not have to know what that one makes.
        """
        facts, rules = self.facts, self.rules
        if facts.deferrable or facts.own_parent:
            return False
        finds_out = rules.merges and not rules.expects_version and not facts.has_triggers
        return self._goes_directly or (finds_out and ready.apart)

    async def _draw_keys(self, session: AsyncSession, count: int) -> Sequence[int] | None:
        return await draw_keys(session, self.facts, self.preparer.columns, count)

    async def _look_up(self, part: Part, session: AsyncSession | None = None) -> Known:
        wanted = self.preparer.wanted_keys(part)
        if not any(wanted.values()):
            return {one.field: {} for one in wanted}
        if session is not None:
            return await self.parents.ids(session, wanted)
        return await self.run.read(lambda session: self.parents.ids(session, wanted))

    async def _commit(self, ready: Ready, turn: Turn) -> Receipt:
        part = ready.part
        for _ in range(STALE_TRIES):
            await asyncio.to_thread(self.input.unchanged)
            if not self._overlaps(ready):
                await turn.may_look()
            try:
                work = partial(self.work, ready=ready, turn=turn)
                return await self.run.commit_chunk(part.number, part.span, work, turn)
            except Stale:
                known = await self._look_up(part)
                prepared = await asyncio.to_thread(self.preparer.prepare, part, known)
                ready = Ready(part, prepared, known)
        raise InputError(
            f"the rows that chunk {part.number} refers to changed {STALE_TRIES} times while it was "
            "imported; run the import when they are at rest"
        )

    async def work(self, session: AsyncSession, ready: Ready, turn: Turn) -> ChunkEffect:
        await self._still_known(session, ready.known)
        created, part, prepared = Created(), ready.part, ready.prepared
        if self.rules.on_missing == "create":
            await turn.may_write()
            prepared = await self._create_missing(session, ready, created)
        try:
            async with session.begin_nested():
                effect = await self._insert(session, ready, prepared, turn)
                await self._stop_at_limit(effect, turn)
        except _TooManyRejects as stop:
            until = prepared.until(stop.position + 1)
            effect = await self._insert(session, ready, until, turn)
            if not self.too_many(self.rejected + len(effect.rejected)):
                raise Race from None  # what stood in the way of a row is gone by now
        references, columns = self.plan.references, self.preparer.columns
        used = effect.used(references, columns, self.rules.update)
        entries = await self.parents.keep_used(session, created, used)
        return self._effect(part, effect, prepared.filtered, entries)

    async def _still_known(self, session: AsyncSession, known: Known) -> None:
        wanted = {one: set(known[one.field]) for one in self.plan.references}
        if any(wanted.values()) and await self.parents.ids(session, wanted) != known:
            raise Stale

    async def _create_missing(
        self, session: AsyncSession, ready: Ready, created: Created
    ) -> Prepared:
        """Create the rows that are named and not there, and prepare the chunk with them."""
        if not ready.prepared.unknown:
            return ready.prepared
        new = await self.parents.create(session, ready.prepared.unknown, created)
        complete = {name: {**ids, **new.get(name, {})} for name, ids in ready.known.items()}
        return await asyncio.to_thread(self.preparer.prepare, ready.part, complete)

    async def _insert(
        self, session: AsyncSession, ready: Ready, prepared: Prepared, turn: Turn
    ) -> _Effect:
        return _Effect(prepared, await self._write(session, ready, prepared, turn))

    async def _write(
        self, session: AsyncSession, ready: Ready, prepared: Prepared, turn: Turn
    ) -> Inserted:
        """Insert at once what nothing stands against; where rows met others last time, staged."""
        columns, batch = self.preparer.columns, prepared.batch
        if self._goes_directly:
            await turn.may_write()
        if self._goes_directly:
            keys = prepared.keys if prepared.epoch == self.epoch else None
            copied = await insert_directly(session, self.facts, columns, batch, keys)
            if copied is None or keys is None:
                self.epoch += 1
            if copied is not None:
                return copied
            await turn.may_look()
        elif not self._overlaps(ready):
            await turn.may_look()
        staged: Inserted
        if self.rules.merges:
            terms = Terms(frozenset(self.plan.given), prepared.given, prepared.expected)
            merging = self.rules.merging(self.model, self._journal(ready.part))
            staged = await merge_rows(
                session, self.facts, columns, batch, terms, merging, turn.may_look
            )
        else:
            conflict = self.rules.on_conflict
            staged = await bulk.insert_rows(session, self.facts, columns, batch, conflict)
        self.epoch += 1
        self.promising = len(staged.inserted) == len(batch)
        return staged

    def _journal(self, part: Part) -> Journal:
        """Behind the lines on what was inserted, into the table and into those it refers to."""
        first = 1 + len(self.plan.references)
        return Journal(self.run.claim, part.number, self.model.name, first)

    async def _stop_at_limit(self, effect: _Effect, turn: Turn) -> None:
        rejected = sorted(effect.rejected)
        most = self.rules.max_rejects
        if most is None or self.rules.atomic or not rejected:
            return
        await turn.may_look()  # by then those of the chunk before are counted
        if len(rejected) > most - self.rejected:
            raise _TooManyRejects(rejected[most - self.rejected])

    def _effect(
        self, part: Part, effect: _Effect, filtered: int, entries: list[Entry]
    ) -> ChunkEffect:
        counts = effect.counts
        counts[Verdict.NOT_REACHED] = len(part.rows) - filtered - sum(counts.values())
        inserted = len(effect.written.inserted)
        if inserted:
            entries = [Entry("insert", self.model.name, inserted, effect.written.keys), *entries]
        return ChunkEffect(
            Receipt(part.number, part.span, filtered, without_zeros(counts)),
            [_row_verdict(part, position, why) for position, why in sorted(effect.refused.items())],
            entries,
            effect.changes(self.model.name),
        )

    def _give_up(self) -> NoReturn:
        after = (
            "nothing was inserted"
            if self.rules.atomic
            else ("the rows behind were not reached, those inserted before stay")
        )
        raise Rejected(
            f"{self.rejected} rows were rejected and at most {self.rules.max_rejects} may be; "
            f"{after}: see `bulwark rejects`"
        )

    async def count_the_rest(self) -> None:
        """Commit, as one last chunk to the end of the input, that its rows were not reached."""
        if self.position.byte >= self.input.text_bytes:
            return
        part, filtered = await asyncio.to_thread(self._rest)
        counts = without_zeros({Verdict.NOT_REACHED: part.span.rows - filtered})
        receipt = Receipt(part.number, part.span, filtered, counts)
        await self.run.commit_chunk(part.number, part.span, already(ChunkEffect(receipt)))

    def _rest(self) -> tuple[Part, int]:
        at = self.position
        rows = filtered = 0
        next_line = at.line
        for part in self._parts():
            rows += part.span.rows
            filtered += self.preparer.count_filtered(part)
            next_line = part.span.next_line
        span = Span(at.row, rows, at.byte, self.input.text_bytes, at.line, next_line)
        return Part(at.chunk_no, span, (), (), (), {}), filtered


async def _open(run: ChunkedRun, source: Input) -> None:
    """Fix, at the first run, what the input is; refuse another one at a later run."""
    start = source.data_start
    span = Span(1, 0, 0, start.byte, 1, start.line)
    opening = await run.commit_chunk(
        OPENING, span, already(ChunkEffect(Receipt(OPENING, span, detail=source.detail)))
    )
    if (opening.detail or {}).get("fingerprint") != source.fingerprint:
        raise InputError(
            "the input is not the one that this job began with; what was committed stays, so "
            "import the new file as a new job with on_conflict skip"
        )


def already(effect: ChunkEffect) -> Any:
    async def work(_: AsyncSession) -> ChunkEffect:
        return effect

    return work


def behind(receipt: Receipt) -> Position:
    span = receipt.span
    return Position(receipt.chunk_no + 1, span.first_row + span.rows, span.end_byte, span.next_line)


def _row_verdict(part: Part, position: int, why: Refusal) -> RowVerdict:
    return RowVerdict(
        row_no=part.span.first_row + position,
        chunk_no=part.number,
        line=part.lines[position],
        verdict=_verdict(why),
        code=why.code,
        column=why.column,
        message=why.message,
        raw=part.raws[position],
    )


def _verdict(why: Refusal) -> Verdict:
    return Verdict.CONFLICT if why.code in CONFLICTS else Verdict.REJECTED


def without_zeros(counts: Mapping[Verdict, int]) -> dict[str, int]:
    return {name.value: count for name, count in counts.items() if count}
