"""From a claim to its end: run the job, commit, and write how it ended."""

import asyncio
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db import steps
from db.errors import AlreadyCommitted, Cancelled, ClaimLost
from db.ledger import job, release
from db.ledger.job import Claim, Reason, State
from db.registry import Registry
from db.retry import DATABASE_ERRORS, describe, is_outage
from db.steps import Step
from db.transaction import transaction
from jobs._declaration import Job, Outcome, Payload
from jobs._discovery import Jobs
from jobs._errors import GivenBack, Rejected, TryLater
from jobs._housekeeping import Housekeeping
from jobs._run import ChunkedRun
from jobs._sources.place import ImportPlace
from worker.batching import commit_together, tell_done
from worker.cancelling import Running, is_told_to_stop
from worker.ending import Ending, cancelled, deferred, outlived, rejected, succeeded, tried
from worker.liveness import Liveness
from worker.payload import payload_of
from worker.settling import Settling, through_outages, told_of

CLOSING_TIMEOUT_S = 600.0
log = structlog.get_logger("bulwark.execution")


@dataclass
class Execution:
    """Carries out jobs that one worker has claimed. When cancelled, it gives them back.

    Chunked ones it gives back before their next chunk once it is `stopping`.
    """

    sessions: async_sessionmaker[AsyncSession]
    jobs: Jobs
    models: Registry
    import_folders: Sequence[ImportPlace]
    liveness: Liveness
    housekeeping: Housekeeping
    running: Running
    settling: Settling = field(init=False)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.settling = Settling(self.sessions)

    async def run_together(self, declared: Job[Any], claims: Sequence[Claim]) -> None:
        """Run them in one transaction; should it fail, run each by itself, to find the guilty."""
        waiting = deque(await self._try_together(declared, claims) if len(claims) > 1 else claims)
        try:
            while waiting:
                held = waiting.popleft()
                with told_of(held):
                    await self.run(held)
        except asyncio.CancelledError:
            await self.settling.give_back_many(waiting)
            raise

    async def _try_together(self, declared: Job[Any], claims: Sequence[Claim]) -> Sequence[Claim]:
        """Run them in one transaction; return those that still have to be run, each by itself.

        When one of them is cancelled on the way, that are all, it first; its fence then tells it.
        """
        failed = log.bind(kind=declared.kind, jobs=len(claims))
        limit_s = max(held.timeout_s for held in claims)
        stopped: Collection[UUID] = ()
        for held in claims:
            self.liveness.limit(held.claim_id, limit_s)
            with told_of(held):
                log.info("job.started", claim=str(held.claim_id), attempt=held.attempt + 1)
        try:
            async with asyncio.timeout(limit_s):
                with self.running.under([held.claim_id for held in claims]) as stopped:
                    done = await commit_together(self.sessions, declared, claims)
        except asyncio.CancelledError:
            if is_told_to_stop():
                await self.settling.give_back_many(claims)
                raise
            failed.warning("batch.failed", reason="it was cancelled from within")
        except Cancelled as error:
            failed.warning("batch.failed", reason=describe(error))
        except (Exception, SystemExit) as error:
            ours = not isinstance(error, (*DATABASE_ERRORS, Rejected, TryLater))
            failed.warning("batch.failed", reason=describe(error), exc_info=ours)
        else:
            tell_done(done)
            steps.reached(Step.ENDED)
            return done.cancelled
        finally:
            for held in claims:
                self.liveness.unlimit(held.claim_id)
        return sorted(claims, key=lambda held: held.claim_id not in stopped)

    async def run(self, held: Claim) -> None:
        """Run the job, and write how it ended. Raises GivenBack when others should hear of it."""
        log.info("job.started", claim=str(held.claim_id), attempt=held.attempt + 1)
        self.liveness.limit(held.claim_id, held.timeout_s)
        try:
            ending = await self._work_until_cancelled(held)
            if ending is not None and ending.state in (State.FAILED, State.CANCELLED):
                await self._close(replace(held, is_cancelled=True))
        except (asyncio.CancelledError, GivenBack):
            self.liveness.unlimit(held.claim_id)
            await self.settling.give_back(held)
            raise
        except ClaimLost:
            self.liveness.unlimit(held.claim_id)
            log.warning("job.claim_lost", claim=str(held.claim_id))
            return
        self.liveness.unlimit(held.claim_id)
        if ending is not None:
            steps.reached(Step.ENDING)
            await self.settling.settle(held, ending)
        steps.reached(Step.ENDED)

    async def _close(self, held: Claim) -> None:
        """Let a chunked job that has failed for good say what became of the rest of its input.

        The claim is there to end the job, cancelled or not. Told to stop meanwhile, the job has not
        failed yet: its next run fails as this one did, and closes.
        """
        if held.kind not in self.jobs or (closing := self.jobs[held.kind].closing) is None:
            return
        self.liveness.limit(held.claim_id, CLOSING_TIMEOUT_S)
        try:
            async with asyncio.timeout(CLOSING_TIMEOUT_S):
                payload = payload_of(self.jobs[held.kind], held)
                await through_outages(lambda: closing(self._chunked(held), payload))
        except GivenBack:
            raise
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and is_told_to_stop():
                raise
            log.warning("job.not_closed", claim=str(held.claim_id), reason=describe(error))

    async def _work_until_cancelled(self, held: Claim) -> Ending | None:
        """Do the job, unless it is cancelled, before it begins, on its way, or at once."""
        try:
            with self.running.under([held.claim_id]):
                if held.is_cancelled:
                    raise Cancelled
                return await self._work(held)
        except Cancelled:
            chunked = held.kind in self.jobs and self.jobs[held.kind].chunked
            return cancelled(held, chunked=chunked)

    async def _work(self, held: Claim) -> Ending | None:
        """Do the job; None when its end is committed already, otherwise what has to be written.

        An outage that it meets is not the job's fault, nor that its time runs out after one.
        """
        began_s = time.monotonic()
        limit = asyncio.timeout(held.timeout_s)
        try:
            declared = self.jobs[held.kind]
            payload = payload_of(declared, held)
            async with limit:
                if declared.chunked:
                    outcome = await declared.run(self._chunked(held), payload)
                    return succeeded(held, outcome)
                outcome = await self._single(held, declared, payload)
        except Rejected as error:
            return rejected(held, error)
        except TryLater as error:
            return deferred(held, self.jobs[held.kind].defaults.max_age, error)
        except (ClaimLost, Cancelled, GivenBack):
            raise
        except asyncio.CancelledError:
            if is_told_to_stop():
                raise
            return tried(held, None, "it was cancelled from within")
        except (Exception, SystemExit) as error:
            timed_out = isinstance(error, TimeoutError) and limit.expired()
            text = f"it ran longer than {held.timeout_s} s" if timed_out else describe(error)
            if not isinstance(error, DATABASE_ERRORS) and not timed_out:
                log.exception("job.raised", claim=str(held.claim_id))
            away = self.liveness.has_missed_since(began_s) if timed_out else is_outage(error)
            reason = Reason.TIMED_OUT if timed_out else None
            if away:
                return outlived(held, self.jobs[held.kind].defaults.max_age, reason, text)
            return tried(held, reason, text)
        log.info("job.succeeded", claim=str(held.claim_id), outcome=outcome)
        return None

    def _chunked(self, held: Claim) -> ChunkedRun:
        return ChunkedRun(
            held,
            self.sessions,
            self.models,
            self.import_folders,
            self.housekeeping,
            self.stopping,
        )

    async def _single(self, held: Claim, declared: Job[Any], payload: Payload) -> Outcome:
        """Fence, effects and ending of a job in one transaction, whose receipt is the ending."""

        outcome: Outcome = None

        async def unit(session: AsyncSession) -> Outcome:
            nonlocal outcome
            try:
                await job.fence(session, held)
            except ClaimLost:
                if await release.ended_by(session, held) == State.SUCCEEDED:
                    raise AlreadyCommitted(outcome) from None
                raise
            steps.reached(Step.FENCED)
            given = (session, payload, held) if declared.claimed else (session, payload)
            outcome = await declared.run(*given)
            steps.reached(Step.APPLIED)
            await release.end(session, held, State.SUCCEEDED, outcome=outcome)
            steps.reached(Step.COMMITTING)
            return outcome

        done = await transaction(self.sessions, unit, name=f"job.{held.kind}", receipted=True)
        steps.reached(Step.COMMITTED)
        return done
