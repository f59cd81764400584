"""Writing how runs ended, whatever PostgreSQL does meanwhile, and at a shutdown in time."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.errors import ClaimLost
from db.ledger.claims import give_back_many
from db.ledger.job import Claim, Reason
from db.retry import DATABASE_ERRORS, describe, is_outage
from db.transaction import brief
from worker.ending import Ending, requeued, tried

GIVE_BACK_TIMEOUT_S = 5.0
OUTCOME_WAIT_S = 2.0
log = structlog.get_logger("bulwark.execution")


class Settling:
    """Writes the endings of one worker's runs that are not committed with their effects."""

    def __init__(self, sessions: async_sessionmaker[AsyncSession]) -> None:
        self._sessions = sessions
        self._last_words: set[asyncio.Task[None]] = set()

    async def rest(self) -> None:
        """Wait until the jobs that were given back are written."""
        await asyncio.gather(*self._last_words, return_exceptions=True)

    async def settle(self, held: Claim, ending: Ending) -> None:
        """Write how it ended; one that PostgreSQL refuses becomes the error of this attempt."""
        try:
            await self._write(held, ending)
        except asyncio.CancelledError:
            await self._last(self._write_in_time(held, ending))
            raise
        except DATABASE_ERRORS as error:
            await self._write_in_time(held, tried(held, None, describe(error)))

    async def give_back(self, held: Claim) -> None:
        """Put the job back into its queue."""
        await self._last(self._write_in_time(held, _given_back(held)))

    async def give_back_many(self, claims: Sequence[Claim]) -> None:
        """Put all these jobs back into their queues."""
        if claims:
            await self._last(self._give_back_in_time(claims))

    async def _last(self, words: Coroutine[Any, Any, None]) -> None:
        """Write in a task of its own, so that another cancellation does not stop it."""
        task = asyncio.create_task(words)
        self._last_words.add(task)
        await asyncio.shield(task)

    async def _write(self, held: Claim, ending: Ending) -> None:
        """Write the ending; while PostgreSQL is away it waits in memory."""
        while True:
            try:
                await brief(
                    self._sessions,
                    ending.write,
                    name="job.end",
                )
            except ClaimLost:
                log.warning("job.claim_lost", claim=str(held.claim_id))
                return
            except DATABASE_ERRORS as error:
                if not is_outage(error):
                    raise
                log.warning("job.outcome_waits", claim=str(held.claim_id), reason=describe(error))
                await asyncio.sleep(OUTCOME_WAIT_S)  # nothing tells that PostgreSQL is back
            else:
                ending.tell(held)
                return

    async def _write_in_time(self, held: Claim, ending: Ending) -> None:
        try:
            async with asyncio.timeout(GIVE_BACK_TIMEOUT_S):
                await self._write(held, ending)
        except (TimeoutError, *DATABASE_ERRORS) as error:
            _tell_unwritten(held, error)

    async def _give_back_in_time(self, claims: Sequence[Claim]) -> None:
        try:
            async with asyncio.timeout(GIVE_BACK_TIMEOUT_S):
                given = await brief(
                    self._sessions,
                    lambda session: give_back_many(session, claims),
                    name="job.end",
                )
        except (TimeoutError, *DATABASE_ERRORS) as error:
            for held in claims:
                with told_of(held):
                    _tell_unwritten(held, error)
            return
        for held in claims:
            with told_of(held):
                if held.job_id in given:
                    _given_back(held).tell(held)
                else:
                    log.warning("job.claim_lost", claim=str(held.claim_id))


async def through_outages(last_words: Callable[[], Awaitable[None]]) -> None:
    """Say what is still to be said, and while PostgreSQL is away, try again and again."""
    while True:
        try:
            return await last_words()
        except DATABASE_ERRORS as error:
            if not is_outage(error):
                raise
            log.warning("job.closing_waits", reason=describe(error))
            await asyncio.sleep(OUTCOME_WAIT_S)  # nothing tells that PostgreSQL is back


def told_of(held: Claim) -> Any:
    """What is logged inside says of which job."""
    return structlog.contextvars.bound_contextvars(job=str(held.job_id), kind=held.kind)


def _given_back(held: Claim) -> Ending:
    return requeued(held, Reason.GIVEN_BACK, "job.given_back")


def _tell_unwritten(held: Claim, error: Exception) -> None:
    log.warning(
        "job.outcome_unwritten",
        claim=str(held.claim_id),
        reason=describe(error),
        remedy="the job is rescued",
    )
