"""The ways in which a run can end: what is written to the job's row and said in the log."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncSession

from db.errors import ClaimLost
from db.ledger import cancellation, chunk, release
from db.ledger.claims import End
from db.ledger.job import Claim, Reason, State
from db.ledger.verdict import write_verdicts
from db.retry import job_backoff_s
from jobs._declaration import Outcome
from jobs._errors import Rejected, TryLater

MAX_ERROR_CHARS = 4000
log = structlog.get_logger("bulwark.execution")


@dataclass(frozen=True)
class Ending:
    """How a run ended: what is written to the job's row, and what the log says once it is."""

    state: State
    write: Callable[[AsyncSession], Awaitable[None]]
    level: str
    event: str
    fields: Mapping[str, Any]

    def tell(self, held: Claim) -> None:
        """Say in the log how it ended, once that is committed."""
        level = logging.getLevelNamesMapping()[self.level]
        log.log(level, self.event, claim=str(held.claim_id), **self.fields)


def _ending(
    held: Claim,
    state: State,
    change: Callable[[AsyncSession], Awaitable[None]],
    level: str,
    event: str,
    **fields: Any,
) -> Ending:
    async def write(session: AsyncSession) -> None:
        """Make the change, unless this very claim made it before and only the answer was lost."""
        try:
            await change(session)
        except ClaimLost:
            if await release.ended_by(session, held) != state:
                raise

    return Ending(state, write, level, event, fields)


def succeeded(held: Claim, outcome: Outcome) -> Ending:
    return _ending(
        held,
        State.SUCCEEDED,
        lambda session: release.end(session, held, State.SUCCEEDED, outcome=outcome),
        "INFO",
        "job.succeeded",
        outcome=outcome,
    )


def failed(held: Claim, reason: Reason, text: str, refusal: Rejected | None = None) -> Ending:
    """The job has failed for good; what its refusal says of its rows is written with that."""

    async def change(session: AsyncSession) -> None:
        await release.end(
            session,
            held,
            State.FAILED,
            reason=reason,
            error=_storable(text),
            outcome=None if refusal is None else _outcome_of(refusal),
        )
        if refusal is not None:
            await write_refused_rows(session, held, refusal)

    return _ending(
        held,
        State.FAILED,
        change,
        "ERROR",
        "job.failed",
        attempt=held.attempt + 1,
        reason=reason.value,
        error=text,
    )


def cancelled(held: Claim, *, chunked: bool) -> Ending:
    """The job goes no further; what it has committed stays, and is said."""

    async def change(session: AsyncSession) -> None:
        outcome = await chunk.report(session, held.job_id) if chunked else None
        reason = await cancellation.read_reason(session, held.job_id)
        await release.end(session, held, State.CANCELLED, error=_storable(reason), outcome=outcome)

    return _ending(held, State.CANCELLED, change, "WARNING", "job.cancelled")


def rejected(held: Claim, refusal: Rejected) -> Ending:
    return failed(held, Reason.REJECTED, str(refusal), refusal)


def _outcome_of(refusal: Rejected) -> Outcome:
    return None if refusal.counts is None else {"verdicts": dict(refusal.counts)}


async def write_refused_rows(session: AsyncSession, held: Claim, refusal: Rejected) -> None:
    """Write the rows that need a look, in the transaction that ends the job."""
    rows = [replace(one, message=_storable(one.message)) for one in refusal.verdicts]
    await write_verdicts(session, held.job_id, rows)


def end_of(held: Claim, result: Outcome | Rejected) -> End:
    """How one of many jobs ends with this result."""
    if not isinstance(result, Rejected):
        return End(held, State.SUCCEEDED, result)
    return End(held, State.FAILED, _outcome_of(result), Reason.REJECTED, _storable(str(result)))


def tell_end(held: Claim, result: Outcome | Rejected) -> None:
    """Say in the log how it ended, once that is committed."""
    ending = rejected(held, result) if isinstance(result, Rejected) else succeeded(held, result)
    ending.tell(held)


def requeued(
    held: Claim,
    reason: Reason,
    event: str,
    delay: timedelta = timedelta(0),
    error: str | None = None,
    *,
    costs_attempt: bool = False,
) -> Ending:
    return _ending(
        held,
        State.QUEUED,
        lambda session: release.requeue(
            session,
            held,
            reason,
            delay=delay,
            error=None if error is None else _storable(error),
            costs_attempt=costs_attempt,
        ),
        "WARNING" if costs_attempt else "INFO",
        event,
        attempt=held.attempt + 1,
        of=held.max_attempts,
        wait_s=round(delay.total_seconds(), 1),
        error=error,
    )


def tried(held: Claim, reason: Reason | None, text: str) -> Ending:
    """Another attempt after a backoff, or the end of all attempts."""
    failures = held.attempt + 1
    if failures >= held.max_attempts:
        return failed(held, reason or Reason.ATTEMPTS_EXHAUSTED, text)
    delay = timedelta(seconds=job_backoff_s(failures))
    return requeued(held, reason or Reason.RETRY, "job.retried", delay, text, costs_attempt=True)


def outlived(held: Claim, max_age: timedelta, reason: Reason | None, text: str) -> Ending:
    """Another attempt after an outage, which is not the job's fault; in time it costs one, too."""
    if timedelta(seconds=held.age_s) > max_age:
        return tried(held, reason, text)
    delay = timedelta(seconds=job_backoff_s(held.attempt + 1))
    return requeued(held, Reason.RETRY, "job.retried", delay, text)


def deferred(held: Claim, max_age: timedelta, later: TryLater) -> Ending:
    if timedelta(seconds=held.age_s) > max_age:
        return failed(held, Reason.TOO_OLD, f"it was put off for longer than {max_age}: {later}")
    return requeued(held, Reason.DEFERRED, "job.deferred", later.delay, str(later))


def _storable(text: str) -> str:
    """Text that PostgreSQL can hold; it holds no NUL and no half of a surrogate pair."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\0")[:MAX_ERROR_CHARS]
