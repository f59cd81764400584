"""Writing one input chunk by chunk, in input order, with the verdicts of its rows."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

from sqlalchemy.ext.asyncio import AsyncSession

from db.catalog import TableFacts, read_facts
from db.errors import Race
from db.ledger.audit import Entry
from db.ledger.chunk import Receipt, Span
from db.ledger.job import Claim
from db.ledger.verdict import Verdict
from db.registry import Model
from jobs._checkpoint import already, behind, find_checkpoint
from jobs._chunk_preparation import ChunkPreparer
from jobs._errors import InputError, Rejected
from jobs._input import Input
from jobs._mapping import Plan, Request
from jobs._outcome import Outcome, without_zeros
from jobs._parents import Created, Parents, Stale
from jobs._part import Part, Position
from jobs._planning import make_plan, require_given
from jobs._preparation import Preparer
from jobs._prepared import Prepared
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
    chunks: ChunkPreparer
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
        checkpoint = await find_checkpoint(run, source)
        preparer = Preparer(model, plan, facts, rules.on_missing)
        writer = make_writer(run.claim, model, facts, plan, preparer.columns)
        return cls(
            run,
            rules,
            source,
            plan,
            preparer,
            parents,
            writer,
            ChunkPreparer(run, preparer, parents, writer),
            checkpoint.position,
            rules.rejects(checkpoint.counts),
            Verdict.NOT_REACHED in checkpoint.counts,
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

        With a session, what they refer to is looked up in its transaction.
        """
        parts = self._parts()
        while (part := await asyncio.to_thread(next, parts, None)) is not None:
            if session is None:
                yield await self.chunks.prepare_ahead(part)
            else:
                yield await self.chunks.prepare(part, session)

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
                ready = await self.chunks.prepare(part)
        raise InputError(
            f"the rows that chunk {part.number} refers to changed {STALE_TRIES} times while it was "
            "written; run the job when they are at rest"
        )

    async def work(self, session: AsyncSession, ready: Ready, turn: Turn) -> ChunkEffect:
        await self.chunks.require_known(session, ready)
        created, prepared = Created(), ready.prepared
        if self.rules.on_missing == "create":
            await turn.may_write()
            prepared = await self.chunks.with_created(session, ready, created)
        try:
            async with session.begin_nested():
                outcome = await self._write(session, ready, prepared, turn)
                await self._stop_at_limit(outcome, turn)
        except _TooManyRejects as stop:
            until = prepared.until(stop.position + 1)
            outcome = await self._write(session, ready, until, turn)
            if not self.too_many(self.rejected + len(outcome.rejected)):
                raise Race from None  # what stood in the way of a row is gone by now
        entries: Sequence[Entry] = ()
        if created.ids:
            references, columns = self.plan.references, self.preparer.columns
            used = outcome.used(references, columns, self.rules.update)
            entries = await self.parents.keep_used(session, created, used)
        return outcome.effect(ready.part, prepared.filtered, self.writer.model.name, entries)

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
