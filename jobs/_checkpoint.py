"""Where a run goes on: in the very input that its job began with, behind what was committed."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger import chunk
from db.ledger.chunk import OPENING, Receipt, Span
from jobs._errors import InputError
from jobs._input import Input
from jobs._part import Position
from jobs._run import ChunkedRun, ChunkEffect


@dataclass(frozen=True)
class Checkpoint:
    """The position that is next, and how many rows before it got which verdict."""

    position: Position
    counts: Mapping[str, int]


async def find_checkpoint(run: ChunkedRun, source: Input) -> Checkpoint:
    """Where the run is to go on; at the first run it fixes what the input is.

    Raises InputError when that was another one.
    """
    await _open(run, source)
    last = await run.read(lambda session: chunk.last_receipt(session, run.claim.job_id))
    tally = await run.read(lambda session: chunk.tally(session, run.claim.job_id))
    position = source.data_start if last is None or last.chunk_no == OPENING else behind(last)
    return Checkpoint(position, tally.counts)


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


def already(effect: ChunkEffect) -> Callable[[AsyncSession], Awaitable[ChunkEffect]]:
    """The work of a chunk that has no effect but what is recorded of it."""

    async def work(_: AsyncSession) -> ChunkEffect:
        return effect

    return work


def behind(receipt: Receipt) -> Position:
    """Where the rows begin that come after those of the receipt."""
    span = receipt.span
    return Position(receipt.chunk_no + 1, span.first_row + span.rows, span.end_byte, span.next_line)
