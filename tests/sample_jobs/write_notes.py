"""A job of many chunks, each of which leaves one note; it can be made to wait at a gate."""

import os
import signal

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger.chunk import Receipt, Span
from jobs._declaration import Outcome, Payload, chunked_job
from jobs._errors import Rejected
from jobs._run import ChunkedRun, ChunkEffect
from tests.sample_jobs.act_out import ADD_NOTE, WAIT_AT_GATE


class WriteNotes(Payload):
    """Before the chunk `gate_before`, or inside the transaction of `gate_in`, it waits at the gate.

    `die_at` is the chunk before which the process kills itself, in every run, and `fail_at` the one
    before which the job fails for good.
    """

    chunks: int
    gate_before: int | None = None
    gate_in: int | None = None
    die_at: int | None = None
    fail_at: int | None = None
    is_counted: bool = True
    return_an_object: bool = False


@chunked_job(timeout_s=120)
async def write_notes(run: ChunkedRun, payload: WriteNotes) -> Outcome:
    """Write the notes 1 to `chunks`."""
    for number in range(1, payload.chunks + 1):
        if number == payload.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == payload.fail_at:
            raise Rejected("no more paper")
        if number == payload.gate_before:
            await run.read(_wait)
        await _write(run, number, payload)
    return {"chunks": object() if payload.return_an_object else payload.chunks}


async def _wait(session: AsyncSession) -> None:
    await session.execute(WAIT_AT_GATE)


async def _write(run: ChunkedRun, number: int, payload: WriteNotes) -> None:
    span = Span(number, 1, number - 1, number, number, number + 1)

    async def work(session: AsyncSession) -> ChunkEffect:
        await session.execute(ADD_NOTE, {"text": f"chunk {number}"})
        if number == payload.gate_in:
            await session.execute(sa.text("SET LOCAL lock_timeout = 0"))
            await _wait(session)
        counts = {"inserted": 1} if payload.is_counted else {}
        return ChunkEffect(Receipt(number, span, counts=counts))

    await run.commit_chunk(number, span, work)
