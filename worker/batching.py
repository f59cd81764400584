"""Many jobs of one kind in one transaction: fence of all, their work, endings of all, commit."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db import steps
from db.errors import AlreadyCommitted
from db.ledger.claims import end_many, fence_many, left_as
from db.ledger.job import Claim, State
from db.ledger.limits import Limits
from db.steps import Step
from db.transaction import transaction
from jobs._declaration import BatchResults, Job, Outcome, Payload
from jobs._errors import Rejected, WrongResults
from worker.ending import end_of, tell_end, write_refused_rows
from worker.payload import payload_of
from worker.settling import told_of

log = structlog.get_logger("bulwark.execution")


@dataclass(frozen=True)
class Done:
    """What was committed for the jobs that were still owned, and the claims for which nothing was.

    The `cancelled` ones still own their jobs, which are to be ended.
    """

    results: list[tuple[Claim, Outcome | Rejected]] = field(default_factory=list)
    lost: list[Claim] = field(default_factory=list)
    cancelled: list[Claim] = field(default_factory=list)


async def commit_together(
    sessions: async_sessionmaker[AsyncSession], declared: Job[Any], claims: Sequence[Claim]
) -> Done:
    """Do all these jobs at once, or none; the receipt is that they have ended by these claims.

    A job that was taken back, or cancelled, is left out. Raises whatever the batch form raises.
    """
    longest_s = max(held.timeout_s for held in claims)
    limits = Limits(statement_s=longest_s, idle_s=longest_s)
    payloads = {held.job_id: _read(declared, held) for held in claims}
    tried: Done | None = None

    async def unit(session: AsyncSession) -> Done:
        nonlocal tried
        fenced = await fence_many(session, claims, limits)
        steps.reached(Step.FENCED)
        owned = fenced.open | fenced.cancelled
        lost = [held for held in claims if held.job_id not in owned]
        if tried is not None and lost and await _have_ended(session, lost):
            raise AlreadyCommitted(tried)
        mine = [held for held in claims if held.job_id in fenced.open]
        read = [(held, payloads[held.job_id]) for held in mine]
        cancelled = [held for held in claims if held.job_id in fenced.cancelled]
        tried = Done(await _results(session, declared, read), lost, cancelled)
        steps.reached(Step.APPLIED)
        await end_many(session, [end_of(held, result) for held, result in tried.results])
        for held, result in tried.results:
            if isinstance(result, Rejected):
                await write_refused_rows(session, held, result)
        steps.reached(Step.COMMITTING)
        return tried

    done = await transaction(sessions, unit, name=f"jobs.{declared.kind}", receipted=True)
    steps.reached(Step.COMMITTED)
    return done


def _read(declared: Job[Any], held: Claim) -> Payload | Rejected:
    try:
        return payload_of(declared, held)
    except Rejected as refusal:
        return refusal


async def _have_ended(session: AsyncSession, lost: Sequence[Claim]) -> bool:
    """Whether an earlier try, whose answer was lost, has committed: then it ended these jobs."""
    left = await left_as(session, lost)
    return any(state in (State.SUCCEEDED, State.FAILED) for state in left.values())


async def _results(
    session: AsyncSession, declared: Job[Any], read: Sequence[tuple[Claim, Payload | Rejected]]
) -> list[tuple[Claim, Outcome | Rejected]]:
    """A result for each job; one whose payload cannot be read is refused."""
    orders = [(payload, held) for held, payload in read if not isinstance(payload, Rejected)]
    results: BatchResults = ()
    if orders:
        assert declared.batch is not None
        results = await declared.batch(session, orders)
    if len(results) != len(orders):
        raise WrongResults(
            f"the batch form of {declared.kind} returned {len(results)} results for "
            f"{len(orders)} orders; it has to return one for each, in their order"
        )
    following = iter(results)
    return [
        (held, payload if isinstance(payload, Rejected) else next(following))
        for held, payload in read
    ]


def tell_done(done: Done) -> None:
    """Say in the log how each job ended, once that is committed."""
    for held, result in done.results:
        with told_of(held):
            tell_end(held, result)
    for held in done.lost:
        with told_of(held):
            log.warning("job.claim_lost", claim=str(held.claim_id))
