"""Parked messages become jobs once a worker is there that knows their kind."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

import structlog
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.ledger import parked
from db.ledger.parked import Reason
from db.transaction import brief, look
from jobs._adoption import adopt_message
from jobs._discovery import Jobs
from jobs._errors import Unadoptable
from jobs._producer import MAX_PAYLOAD_BYTES

BATCH = 20
MAX_MESSAGE_BYTES = 8 * MAX_PAYLOAD_BYTES
"""Larger ones are not even read: JSON takes six bytes at most for one of the payload's."""
log = structlog.get_logger("bulwark.adopting")


@dataclass(frozen=True)
class _Outcome:
    """What became of one message: a job, or another reason to stay parked."""

    arq_id: str
    queue: str
    kind: str
    job_id: UUID | None = None
    reason: Reason | None = None


async def adopt_known(
    sessions: async_sessionmaker[AsyncSession],
    jobs: Jobs,
    queues: Collection[str],
    within_s: float,
) -> bool:
    """Make jobs, which a relay rings, of what was parked by workers that did not know its kind.

    Of any number of workers that do so at once one takes each message. A message that is no job
    for another reason stays parked with that one. Begins no batch once the time is over; tells
    whether some may be left.
    """
    kinds, ends_s = [*jobs], time.monotonic() + within_s
    while True:
        numbers = await look(sessions, lambda s: parked.named(s, kinds, queues, BATCH))
        if not numbers or not await _adopt(sessions, jobs, numbers):
            return False
        if time.monotonic() > ends_s:
            return True


async def _adopt(
    sessions: async_sessionmaker[AsyncSession], jobs: Jobs, numbers: Collection[int]
) -> bool:
    """Returns whether any is done with: others have taken the rest, or its row is not as parked."""

    async def work(session: AsyncSession) -> list[_Outcome]:
        return [
            await _adopt_one(session, jobs, *message)
            for message in await parked.take_named(session, numbers)
        ]

    outcomes = await brief(sessions, work, name="message.adopt")
    _tell(outcomes)
    return any(one.reason is not Reason.UNKNOWN_JOB for one in outcomes)


async def _adopt_one(
    session: AsyncSession,
    jobs: Jobs,
    number: int,
    queue: str,
    arq_id: str,
    kind: str,
    size: int,
) -> _Outcome:
    try:
        if size > MAX_MESSAGE_BYTES:
            raise Unadoptable(Reason.TOO_LARGE, kind)
        message = await parked.content_of(session, number)
        async with session.begin_nested():  # PostgreSQL may refuse the payload
            job_id = await adopt_message(session, jobs, queue, arq_id, message, timedelta(0))
    except Unadoptable as error:
        await parked.leave(session, number, error.reason)
        return _Outcome(arq_id, queue, kind, reason=error.reason)
    await parked.settle(session, number, job_id)
    return _Outcome(arq_id, queue, kind, job_id)


def _tell(outcomes: Sequence[_Outcome]) -> None:
    for one in outcomes:
        if one.job_id is not None:
            job = str(one.job_id)
            log.info("message.adopted", job=job, arq_id=one.arq_id, queue=one.queue)
        else:
            log.warning(
                "message.parked",
                arq_id=one.arq_id,
                queue=one.queue,
                kind=one.kind,
                reason=one.reason,
                remedy="see `bulwark parked`",
            )
