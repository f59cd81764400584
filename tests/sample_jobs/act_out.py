"""A job in one transaction that leaves a note and then does as it is told."""

import asyncio
import sys
import time
from datetime import timedelta
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger.verdict import RowVerdict
from jobs._declaration import Outcome, Payload, job
from jobs._errors import Rejected, TryLater

NOTES = "CREATE TABLE note (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, text text)"
ADD_NOTE = sa.text("INSERT INTO note (text) VALUES (:text)")
GATE = 4711
WAIT_AT_GATE = sa.text(f"SELECT pg_advisory_xact_lock_shared({GATE})")
"""Passes once nobody holds the lock exclusively."""

COUNTS_OF_GOOD = {"moved": 2, "rejected": 1}
COUNTS_OF_BAD = {"rejected": 2, "not_reached": 1}
BAD_ROWS = [
    RowVerdict(1, 0, None, "rejected", "roster_full", "hero_id", "no room for \0", b"1"),
    RowVerdict(3, 0, None, "rejected", "unknown_hero", None, "no such hero", None),
]

Deed = Literal[
    "return",
    "reject",
    "reject_oddly",
    "reject_rows",
    "count_rows",
    "put_off",
    "fail",
    "break_a_constraint",
    "hang",
    "cancel_itself",
    "exit",
    "put_off_oddly",
    "commit",
    "return_an_object",
    "block",
]


class ActOut(Payload):
    """`seconds` is how long a block lasts, or for how long the job is put off."""

    note: str = "done"
    gate: bool = False
    then: Deed = "return"
    seconds: float = 0.0


@job(timeout_s=60, max_attempts=3, max_age=timedelta(hours=1))
async def act_out(session: AsyncSession, payload: ActOut) -> Outcome:
    """Leave the note, wait at the gate if told so, then act."""
    await session.execute(ADD_NOTE, {"text": payload.note})
    if payload.gate:
        await session.execute(WAIT_AT_GATE)
    match payload.then:
        case "reject":
            raise Rejected("no such club")
        case "reject_oddly":
            raise Rejected("a NUL \0 and half a pair \ud800")
        case "reject_rows":
            raise Rejected("2 of 3 rows are bad", counts=COUNTS_OF_BAD, verdicts=BAD_ROWS)
        case "count_rows":
            return {"verdicts": COUNTS_OF_GOOD}
        case "put_off":
            raise TryLater(timedelta(seconds=payload.seconds), "the club is closed")
        case "fail":
            raise ValueError("the dice fell badly")
        case "break_a_constraint":
            await session.execute(sa.text("INSERT INTO team (name) VALUES ('A'), ('A')"))
        case "hang":
            await asyncio.Event().wait()
        case "cancel_itself" | "exit" | "put_off_oddly" | "commit":
            await _do_what_no_job_may(session, payload.then)
        case "return_an_object":
            return {"what": object()}
        case "block":
            time.sleep(payload.seconds)  # noqa: ASYNC251 - a job that blocks the event loop
    return {"note": payload.note}


async def _do_what_no_job_may(session: AsyncSession, deed: Deed) -> None:
    if deed == "cancel_itself":
        raise asyncio.CancelledError
    if deed == "exit":
        sys.exit("the game is over")
    if deed == "put_off_oddly":
        raise TryLater("a moment")  # type: ignore[arg-type]  # that is what is tried
    await session.commit()
