"""A job of many chunks, each of which leaves one note; it can be made to wait at a gate."""

import os
import signal

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger.chunk import Receipt, Span
from jobs._declaration import Outcome, Payload, chunked_job
from jobs._run import ChunkedRun, ChunkEffect
from tests.sample_jobs.act_out import ADD_NOTE, WAIT_AT_GATE


class WriteNotes(Payload):
    """Before the chunk `gate_before`, or inside the transaction of `gate_in`, it waits at the gate.

    `die_at` is the chunk before which the process kills itself, in every run.
    """

    chunks: int
    gate_before: int | None = None
    gate_in: int | None = None
    die_at: int | None = None
    return_an_object: bool = False


@chunked_job(timeout_s=120)
async def write_notes(run: ChunkedRun, payload: WriteNotes) -> Outcome:
    """Write the notes 1 to `chunks`."""
    for number in range(1, payload.chunks + 1):
        if number == payload.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == payload.gate_before:
            await run.read(_wait)
        await _write(run, number, gate=number == payload.gate_in)
    return {"chunks": object() if payload.return_an_object else payload.chunks}


async def _wait(session: AsyncSession) -> None:
    await session.execute(WAIT_AT_GATE)


async def _write(run: ChunkedRun, number: int, *, gate: bool) -> None:
    span = Span(number, 1, number - 1, number, number, number + 1)

    async def work(session: AsyncSession) -> ChunkEffect:
        await session.execute(ADD_NOTE, {"text": f"chunk {number}"})
        if gate:
            await session.execute(sa.text("SET LOCAL lock_timeout = 0"))
            await _wait(session)
        return ChunkEffect(Receipt(number, span, counts={"inserted": 1}))

    await run.commit_chunk(number, span, work)
