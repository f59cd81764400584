"""Around one delivery: claim, run, commit, and write how it ended."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import structlog
from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.errors import AlreadyCommitted, ClaimLost, CommitUnknown
from db.ledger import job
from db.ledger.job import Claim, Reason, State
from db.registry import Registry
from db.retry import BUDGETS, DATABASE_ERRORS, Fault, classify, describe
from db.transaction import transaction
from jobs._declaration import Job, Jobs, Outcome, Payload
from jobs._errors import Rejected, TryLater
from jobs._housekeeping import Housekeeping
from jobs._run import ChunkedRun
from jobs._sources.place import ImportPlace
from worker.ending import Ending, deferred, failed, outlived, requeued, succeeded, tried
from worker.liveness import Liveness

GIVE_BACK_TIMEOUT_S = 5.0
OUTCOME_WAIT_S = 2.0
CLOSING_TIMEOUT_S = 600.0
log = structlog.get_logger("bulwark.execution")


SOLITUDE_WAIT_S = 5.0
"""How long one suspect may keep other jobs of its worker from starting, before it runs itself."""


class Solitude:
    """Lets many jobs run at once, or one alone, which keeps others from starting."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._running = 0
        self._alone = False

    @asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._alone)
            self._running += 1
        try:
            yield
        finally:
            async with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[bool]:
        """Tell whether one is alone now, once those that run have ended; no other starts.

        The answer is no when they take longer than SOLITUDE_WAIT_S, and at once when somebody
        else is alone or waits for it.
        """
        if self._alone:
            yield False
            return
        self._alone = True
        try:
            yield await self._others_end()
        finally:
            async with self._changed:
                self._alone = False
                self._changed.notify_all()

    async def _others_end(self) -> bool:
        try:
            async with asyncio.timeout(SOLITUDE_WAIT_S), self._changed:
                await self._changed.wait_for(lambda: self._running == 0)
        except TimeoutError:
            return False
        return True


@dataclass
class Executor:
    """Carries out deliveries for one worker row.

    `unclaimed` are jobs whose rings were heard in vain, for whoever can have them rung again.
    """

    worker_id: UUID
    sessions: async_sessionmaker[AsyncSession]
    jobs: Jobs
    models: Registry
    import_folders: Sequence[ImportPlace]
    liveness: Liveness
    housekeeping: Housekeeping = field(default_factory=Housekeeping)
    solitude: Solitude = field(default_factory=Solitude)
    unclaimed: set[UUID] = field(default_factory=set)
    _deliveries: set[asyncio.Task[Any]] = field(default_factory=set)
    _last_words: set[asyncio.Task[None]] = field(default_factory=set)
    _stopping: bool = False

    def stop(self) -> None:
        """Give back what still runs, and take nothing more; a second call does nothing."""
        if not self._stopping:
            self._stopping = True
            for task in self._deliveries:
                task.cancel()

    async def idle(self) -> None:
        """Wait until no delivery is being carried out."""
        while self._deliveries:
            await asyncio.wait(self._deliveries)

    async def settle(self) -> None:
        """Wait until the jobs that were given back are written."""
        await asyncio.gather(*self._last_words, return_exceptions=True)

    async def deliver(self, job_id: UUID) -> None:
        """Run the job if it can be claimed; a delivery that comes twice, or late, does nothing.

        When cancelled, the job is given back to its queue.
        """
        if self._stopping:
            self.unclaimed.add(job_id)
            return
        delivery = asyncio.current_task()
        assert delivery is not None
        self._deliveries.add(delivery)
        try:
            async with self.solitude.together():
                if await self._claim_and_run(job_id, alone=False):
                    return
            if await self._waits_for_solitude(job_id):
                async with self.solitude.alone() as alone:
                    if alone:
                        await self._claim_and_run(job_id, alone=True)
        except DATABASE_ERRORS as error:
            self._give_up(job_id, error)
        except asyncio.CancelledError:
            self.unclaimed.add(job_id)
            raise
        finally:
            self._deliveries.discard(delivery)

    def _give_up(self, job_id: UUID, error: Exception) -> None:
        """Leave the job unclaimed; after an error that will not pass, until its next ring."""
        log.warning("job.not_claimed", job=str(job_id), reason=describe(error))
        if isinstance(error, CommitUnknown) or classify(error) in BUDGETS:
            self.unclaimed.add(job_id)

    async def _claim_and_run(self, job_id: UUID, *, alone: bool) -> bool:
        claim_id = uuid4()
        self.liveness.hold(claim_id)
        try:
            held = await self._claim(job_id, claim_id, alone=alone)
            if held is None:
                return False
            with structlog.contextvars.bound_contextvars(job=str(job_id), kind=held.kind):
                await self._run(held)
            return True
        finally:
            self.liveness.release(claim_id)

    async def _claim(self, job_id: UUID, claim_id: UUID, *, alone: bool) -> Claim | None:
        return await transaction(
            self.sessions,
            lambda s: job.claim(s, job_id, claim_id, self.worker_id, alone=alone),
            name="job.claim",
            receipted=True,
        )

    async def _waits_for_solitude(self, job_id: UUID) -> bool:
        return await transaction(
            self.sessions,
            lambda s: job.waits_for_solitude(s, job_id),
            name="job.solitude",
            receipted=True,
        )

    async def _run(self, held: Claim) -> None:
        log.info("job.started", claim=str(held.claim_id), attempt=held.attempt + 1)
        self.liveness.limit(held.claim_id, held.timeout_s)
        try:
            ending = await self._work(held)
            if ending is not None and ending.state == State.FAILED:
                await self._close(held)
        except asyncio.CancelledError:
            await self._give_back(held)
            raise
        except ClaimLost:
            log.warning("job.claim_lost", claim=str(held.claim_id))
            return
        self.liveness.unlimit(held.claim_id)
        if ending is not None:
            await self._settle(held, ending)

    async def _close(self, held: Claim) -> None:
        """Let a chunked job that has failed for good say what became of the rest of its input.

        Told to stop meanwhile, the job has not failed yet: its next run fails as this one did, and
        closes.
        """
        if held.kind not in self.jobs or (closing := self.jobs[held.kind].closing) is None:
            return
        self.liveness.limit(held.claim_id, CLOSING_TIMEOUT_S)
        try:
            async with asyncio.timeout(CLOSING_TIMEOUT_S):
                await closing(self._chunked(held), _payload(self.jobs[held.kind], held))
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and _is_told_to_stop():
                raise
            log.warning("job.not_closed", claim=str(held.claim_id), reason=describe(error))

    async def _work(self, held: Claim) -> Ending | None:
        """Do the job; None when its end is committed already, otherwise what has to be written."""
        limit = asyncio.timeout(held.timeout_s)
        try:
            declared = self.jobs[held.kind]
            payload = _payload(declared, held)
            async with limit:
                if declared.chunked:
                    outcome = await declared.run(self._chunked(held), payload)
                    return succeeded(held, outcome)
                outcome = await self._single(held, declared, payload)
        except Rejected as error:
            return failed(held, Reason.REJECTED, str(error))
        except TryLater as error:
            return deferred(held, self.jobs[held.kind].defaults.max_age, error)
        except ClaimLost:
            raise
        except asyncio.CancelledError:
            if _is_told_to_stop():
                raise
            return tried(held, None, "it was cancelled from within")
        except Exception as error:
            timed_out = isinstance(error, TimeoutError) and limit.expired()
            text = f"it ran longer than {held.timeout_s} s" if timed_out else describe(error)
            if not isinstance(error, DATABASE_ERRORS) and not timed_out:
                log.exception("job.raised", claim=str(held.claim_id))
            if not timed_out and classify(error) is Fault.OUTAGE:
                return outlived(held, self.jobs[held.kind].defaults.max_age, text)
            return tried(held, Reason.TIMED_OUT if timed_out else None, text)
        log.info("job.succeeded", claim=str(held.claim_id), outcome=outcome)
        return None

    def _chunked(self, held: Claim) -> ChunkedRun:
        return ChunkedRun(held, self.sessions, self.models, self.import_folders, self.housekeeping)

    async def _single(self, held: Claim, declared: Job[Any], payload: Payload) -> Outcome:
        """Fence, effects and ending of a job in one transaction, whose receipt is the ending."""

        outcome: Outcome = None

        async def unit(session: AsyncSession) -> Outcome:
            nonlocal outcome
            try:
                await job.fence(session, held)
            except ClaimLost:
                if await job.ended_by(session, held) == State.SUCCEEDED:
                    raise AlreadyCommitted(outcome) from None
                raise
            given = (session, payload, held) if declared.claimed else (session, payload)
            outcome = await declared.run(*given)
            await job.end(session, held, State.SUCCEEDED, outcome=outcome)
            return outcome

        return await transaction(self.sessions, unit, name=f"job.{held.kind}", receipted=True)

    async def _settle(self, held: Claim, ending: Ending) -> None:
        """Write how it ended; one that PostgreSQL refuses becomes the error of this attempt."""
        try:
            await self._write(held, ending)
        except asyncio.CancelledError:
            await self._write_at_shutdown(held, ending)
            raise
        except DATABASE_ERRORS as error:
            await self._write_in_time(held, tried(held, None, describe(error)))

    async def _write(self, held: Claim, ending: Ending) -> None:
        """Write the ending; while PostgreSQL is away it waits in memory."""
        while True:
            try:
                await transaction(self.sessions, ending.write, name="job.end", receipted=True)
            except ClaimLost:
                log.warning("job.claim_lost", claim=str(held.claim_id))
                return
            except DATABASE_ERRORS as error:
                if classify(error) is not Fault.OUTAGE:
                    raise
                log.warning("job.outcome_waits", claim=str(held.claim_id), reason=describe(error))
                await asyncio.sleep(OUTCOME_WAIT_S)  # nothing tells that PostgreSQL is back
            else:
                ending.tell(held)
                return

    async def _give_back(self, held: Claim) -> None:
        await self._write_at_shutdown(held, requeued(held, Reason.GIVEN_BACK, "job.given_back"))

    async def _write_at_shutdown(self, held: Claim, ending: Ending) -> None:
        """Write the ending in a task of its own, so that another cancellation does not stop it."""
        task = asyncio.create_task(self._write_in_time(held, ending))
        self._last_words.add(task)
        await asyncio.shield(task)

    async def _write_in_time(self, held: Claim, ending: Ending) -> None:
        try:
            async with asyncio.timeout(GIVE_BACK_TIMEOUT_S):
                await self._write(held, ending)
        except (TimeoutError, *DATABASE_ERRORS) as error:
            log.warning(
                "job.outcome_unwritten",
                claim=str(held.claim_id),
                reason=describe(error),
                remedy="the job is rescued",
            )


def _is_told_to_stop() -> bool:
    """Whether a cancellation came from outside, and not out of the job's own awaiting."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _payload(declared: Job[Any], held: Claim) -> Payload:
    try:
        payload: Payload = declared.payload.model_validate(held.payload)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        text = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'payload'}: {problem['msg']}"
            for problem in problems
        )
        raise Rejected(f"the payload does not fit {declared.payload.__name__}: {text}") from None
    return payload
