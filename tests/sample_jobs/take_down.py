"""A job with a batch form: each leaves a note, and some do as they are told beside it."""

import asyncio
import os
import signal
from collections.abc import Sequence
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger.job import Claim
from jobs._declaration import BatchResults, Outcome, Payload, job
from jobs._errors import Rejected
from tests.sample_jobs.act_out import ADD_NOTE, BAD_ROWS, COUNTS_OF_BAD, WAIT_AT_GATE

BREAK_A_CONSTRAINT = sa.text("INSERT INTO team (name) VALUES ('A'), ('A')")


class TakeDown(Payload):
    """Those that wait at the gate do so before any note is left."""

    note: str
    gate: bool = False
    then: Literal[
        "return",
        "reject",
        "fail",
        "break_a_constraint",
        "return_an_object",
        "return_too_few",
        "hang",
        "hang_together",
        "die",
    ] = "return"


async def take_down_many(
    session: AsyncSession, orders: Sequence[tuple[TakeDown, Claim]]
) -> BatchResults:
    """Leave all notes but those of the refused; the outcome says how many went together."""
    results = [await _act(session, order, together=len(orders)) for order, _ in orders]
    return results[:-1] if any(one.then == "return_too_few" for one, _ in orders) else results


@job(timeout_s=60, max_attempts=3, batch=take_down_many)
async def take_down(session: AsyncSession, payload: TakeDown) -> Outcome:
    """Leave the note."""
    result = await _act(session, payload, together=1)
    if isinstance(result, Rejected):
        raise result
    return result


async def _act(session: AsyncSession, order: TakeDown, *, together: int) -> Outcome | Rejected:
    if order.gate:
        await session.execute(sa.text("SET LOCAL lock_timeout = 0"))
        await session.execute(WAIT_AT_GATE)
    match order.then:
        case "reject":
            return Rejected("no such club", counts=COUNTS_OF_BAD, verdicts=BAD_ROWS)
        case "fail":
            raise ValueError("the dice fell badly")
        case "break_a_constraint":
            await session.execute(BREAK_A_CONSTRAINT)
        case "return_an_object":
            return {"what": object()}
        case "hang":
            await asyncio.Event().wait()
        case "hang_together" if together > 1:
            await asyncio.Event().wait()
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
    await session.execute(ADD_NOTE, {"text": order.note})
    return {"together": together}
