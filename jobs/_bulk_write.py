"""Writing one input chunk by chunk, in input order, with the verdicts of its rows."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from sqlalchemy.ext.asyncio import AsyncSession

from db.catalog import TableFacts, read_facts
from db.errors import Race
from db.ledger import chunk
from db.ledger.chunk import OPENING, Receipt, Span
from db.ledger.job import Claim
from db.ledger.verdict import Verdict
from db.registry import Model
from jobs._errors import InputError, Rejected
from jobs._input import Input
from jobs._mapping import Plan, Request
from jobs._outcome import Outcome, without_zeros
from jobs._parents import Created, Parents, Stale
from jobs._part import Part, Position
from jobs._planning import make_plan, require_given
from jobs._preparation import Preparer
from jobs._prepared import Prepared
from jobs._references import Known
from jobs._rules import Rules
from jobs._run import ChunkedRun, ChunkEffect
from jobs._together import Together
from jobs._turn import Turn, in_turn
from jobs._writer import Ready, Writer

STALE_TRIES = 20
MakeWriter = Callable[[Claim, Model, TableFacts, Plan, Sequence[str]], Writer]


class _TooManyRejects(Exception):
    """The chunk holds the one reject too many, at this position."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


@dataclass
class BulkWrite:
    """One input on its way into one table, from the position that is next."""

    run: ChunkedRun
    rules: Rules
    input: Input
    plan: Plan
    preparer: Preparer
    parents: Parents
    writer: Writer
    position: Position
    rejected: int
    given_up: bool
    outside: Context = field(default_factory=copy_context)

    @classmethod
    async def begin(
        cls,
        run: ChunkedRun,
        rules: Rules,
        request: Request,
        model: Model,
        source: Input,
        make_writer: MakeWriter,
    ) -> "BulkWrite":
        """Check the input against the model before any row is touched, and find where to go on."""
        facts = await run.read(lambda session: read_facts(session, model.table))
        columns, partial = source.columns, rules.partial
        plan = make_plan(request, columns, model.name, model.create, facts, partial=partial)
        if rules.update is not None:
            require_given(rules.update, plan, model.name)
        creatable = rules.on_missing == "create"
        parents = await Parents.find(run, facts, plan, creatable=creatable)
        await _open(run, source)
        last = await run.read(lambda session: chunk.last_receipt(session, run.claim.job_id))
        tally = await run.read(lambda session: chunk.tally(session, run.claim.job_id))
        preparer = Preparer(model, plan, facts, rules.on_missing)
        return cls(
            run,
            rules,
            source,
            plan,
            preparer,
            parents,
            make_writer(run.claim, model, facts, plan, preparer.columns),
            source.data_start if last is None or last.chunk_no == OPENING else behind(last),
            rules.rejects(tally.counts),
            Verdict.NOT_REACHED in tally.counts,
        )

    def _parts(self) -> Iterator[Part]:
        return self.input.parts(self.rules.chunk_rows, self.rules.chunk_bytes, self.position)

    async def write_all(self) -> None:
        """Write the chunks that are missing; Rejected when there are too many rejects, or rows."""
        if self.too_many(self.rejected):
            self._give_up()
        if self.given_up:
            raise Rejected(
                "an earlier run gave this input up and counted its last rows as not reached; "
                "give those to a new job"
            )
        await self._require_few()
        if self.rules.together:
            if (receipt := await Together(self).write_all()) is not None:
                self._count(receipt)
        else:
            await self._write_in_turn()
        if self.too_many(self.rejected):
            self._give_up()

    async def _write_in_turn(self) -> None:
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

    async def _commit(self, ready: Ready, turn: Turn) -> Receipt:
        part = ready.part
        for _ in range(STALE_TRIES):
            await asyncio.to_thread(self.input.unchanged)
            if not self.writer.overlaps(ready):
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
            "written; run the job when they are at rest"
        )

    async def work(self, session: AsyncSession, ready: Ready, turn: Turn) -> ChunkEffect:
        await self._still_known(session, ready.known)
        created, prepared = Created(), ready.prepared
        if self.rules.on_missing == "create":
            await turn.may_write()
            prepared = await self._create_missing(session, ready, created)
        try:
            async with session.begin_nested():
                outcome = await self._write(session, ready, prepared, turn)
                await self._stop_at_limit(outcome, turn)
        except _TooManyRejects as stop:
            until = prepared.until(stop.position + 1)
            outcome = await self._write(session, ready, until, turn)
            if not self.too_many(self.rejected + len(outcome.rejected)):
                raise Race from None  # what stood in the way of a row is gone by now
        references, columns = self.plan.references, self.preparer.columns
        used = outcome.used(references, columns, self.rules.update)
        entries = await self.parents.keep_used(session, created, used)
        return outcome.effect(ready.part, prepared.filtered, self.writer.model.name, entries)

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

    async def _write(
        self, session: AsyncSession, ready: Ready, prepared: Prepared, turn: Turn
    ) -> Outcome:
        return Outcome(prepared, await self.writer.write(session, ready, prepared, turn))

    async def _stop_at_limit(self, outcome: Outcome, turn: Turn) -> None:
        rejected = sorted(outcome.rejected)
        most = self.rules.max_rejects
        if most is None or self.rules.together or not rejected:
            return
        await turn.may_look()  # by then those of the chunk before are counted
        if len(rejected) > most - self.rejected:
            raise _TooManyRejects(rejected[most - self.rejected])

    async def _require_few(self) -> None:
        """Raise Rejected when the input has more rows than it may, with nothing written."""
        most = self.rules.max_rows
        if most is None or self.position != self.input.data_start:
            return
        part, filtered = await asyncio.to_thread(self._rest)
        if (rows := part.span.rows - filtered) > most:
            raise Rejected(
                f"the input has {rows} rows and at most {most} may be written; nothing was "
                "written: raise --max-rows if that is meant"
            )

    def _give_up(self) -> NoReturn:
        after = (
            "nothing was written"
            if self.rules.together
            else "the rows behind were not reached, those written before stay"
        )
        raise Rejected(
            f"{self.rejected} rows were rejected and at most {self.rules.max_rejects} may be; "
            f"{after}: see `bulwark rejects`"
        )

    async def count_the_rest(self) -> None:
        """Commit, as one last chunk to the end of the input, that its rows were not reached.

        Should a chunk be there after all, whose COMMIT was still under way, it goes on behind it.
        """
        while self.position.byte < self.input.text_bytes:
            part, filtered = await asyncio.to_thread(self._rest)
            counts = without_zeros({Verdict.NOT_REACHED: part.span.rows - filtered})
            receipt = Receipt(part.number, part.span, filtered, counts)
            work = already(ChunkEffect(receipt))
            self.position = behind(await self.run.commit_chunk(part.number, part.span, work))

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
            "the input is not the one that this job began with; what was committed stays, so give "
            "the rows behind it to a new job, or to an import with on_conflict skip all of them"
        )


def already(effect: ChunkEffect) -> Any:
    async def work(_: AsyncSession) -> ChunkEffect:
        return effect

    return work


def behind(receipt: Receipt) -> Position:
    span = receipt.span
    return Position(receipt.chunk_no + 1, span.first_row + span.rows, span.end_byte, span.next_line)
