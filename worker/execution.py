"""Around one delivery: claim, run, commit, and write how it ended."""

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID, uuid4

import structlog
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db import steps
from db.errors import AlreadyCommitted, Cancelled, ClaimLost, CommitUnknown
from db.ledger import job, release
from db.ledger.claims import claim_many
from db.ledger.job import Claim, Reason, Ring, State
from db.registry import Registry
from db.retry import BUDGETS, DATABASE_ERRORS, Fault, classify, describe
from db.steps import Step
from db.transaction import brief, transaction
from jobs._declaration import Job, Outcome, Payload
from jobs._discovery import Jobs
from jobs._errors import Rejected, TryLater
from jobs._housekeeping import Housekeeping
from jobs._run import ChunkedRun
from jobs._sources.place import ImportPlace
from worker.batching import commit_together, tell_done
from worker.cancelling import Running, is_told_to_stop
from worker.ending import Ending, cancelled, deferred, outlived, rejected, succeeded, tried
from worker.gathering import Batch, Gathering, Turn
from worker.liveness import Liveness
from worker.payload import payload_of
from worker.settling import Settling, through_outages, told_of
from worker.solitude import Solitude

CLOSING_TIMEOUT_S = 600.0
Silence = Callable[[Sequence[Ring]], Coroutine[Any, Any, None]]
log = structlog.get_logger("bulwark.execution")


async def _leave_rings(_: Sequence[Ring]) -> None:
    """Rings of jobs that are claimed do nothing when they are heard."""


@dataclass
class Executor:
    """Carries out deliveries for one worker row.

    `unclaimed` are jobs whose rings were heard in vain, for whoever can have them rung again.
    `silence` takes rings out of Redis whose jobs are claimed already.
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
    silence: Silence = _leave_rings
    running: Running = field(default_factory=Running)
    _deliveries: set[asyncio.Task[Any]] = field(default_factory=set)
    _gatherings: defaultdict[str, Gathering] = field(default_factory=lambda: defaultdict(Gathering))
    _turned_away: set[UUID] = field(default_factory=set)
    _stopping: bool = False

    def __post_init__(self) -> None:
        self._settling = Settling(self.sessions)

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
        await self._settling.rest()

    async def deliver(self, job_id: UUID, kind: str | None = None) -> None:
        """Run the job if it can be claimed; a delivery that comes twice, or late, does nothing.

        Where its kind is told and has a batch form, it is run together with others that wait.
        When cancelled, the jobs are given back to their queue.
        """
        if self._stopping:
            self.unclaimed.add(job_id)
            return
        delivery = asyncio.current_task()
        assert delivery is not None
        self._deliveries.add(delivery)
        try:
            if not await self._carry_out_together(job_id, kind):
                await self._carry_out(job_id)
        except DATABASE_ERRORS as error:
            self._give_up(job_id, error)
        except asyncio.CancelledError:
            self.unclaimed.add(job_id)
            raise
        finally:
            self._deliveries.discard(delivery)

    async def _carry_out(self, job_id: UUID) -> None:
        async with self.solitude.together():
            if await self._claim_and_run(job_id, alone=False):
                return
        if await self._waits_for_solitude(job_id):
            async with self.solitude.alone() as alone:
                if alone:
                    await self._claim_and_run(job_id, alone=True)
                    self._call_turned_away()
                else:
                    self._turned_away.add(job_id)

    def _call_turned_away(self) -> None:
        """Have the suspects that came in vain rung again: by their age that might take minutes."""
        self.unclaimed |= self._turned_away
        self._turned_away.clear()

    async def _carry_out_together(self, job_id: UUID, kind: str | None) -> bool:
        """Carry it out with others of its kind; tell whether nothing is left to do for it."""
        if kind is None or kind not in self.jobs or self.jobs[kind].batch is None:
            return False
        gathering = self._gatherings[kind]
        turn = await gathering.turn(job_id)
        if turn is not Turn.LEADS:
            return turn is Turn.TAKEN
        async with gathering.batch(job_id) as batch, self.solitude.together():
            return await self._claim_and_run_together(gathering, batch, self.jobs[kind])

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
            steps.reached(Step.CLAIMED)
            with told_of(held):
                await self._run(held)
            return True
        finally:
            self.liveness.release(claim_id)

    async def _claim(self, job_id: UUID, claim_id: UUID, *, alone: bool) -> Claim | None:
        return await brief(
            self.sessions,
            lambda s: job.claim(s, job_id, claim_id, self.worker_id, alone=alone),
            name="job.claim",
        )

    async def _waits_for_solitude(self, job_id: UUID) -> bool:
        return await brief(
            self.sessions,
            lambda s: job.waits_for_solitude(s, job_id),
            name="job.solitude",
        )

    async def _claim_and_run_together(
        self, gathering: Gathering, batch: Batch, declared: Job[Any]
    ) -> bool:
        room = len(batch.heard) if self.liveness.is_retiring else batch.room
        claim_ids = [uuid4() for _ in range(room)]
        for claim_id in claim_ids:
            self.liveness.hold(claim_id)
        try:
            taken = await brief(
                self.sessions,
                lambda s: claim_many(s, declared.kind, batch.heard, claim_ids, self.worker_id),
                name="job.claim",
            )
            if taken.claims:
                steps.reached(Step.CLAIMED)
            gathering.is_crowded = len(taken.claims) == room
            batch.settle(alone=taken.left)
            if taken.company:
                beside = asyncio.create_task(self.silence(taken.company))
                self._deliveries.add(beside)
                beside.add_done_callback(self._deliveries.discard)
            await self._run_together(declared, taken.claims)
            return batch.heard[0] not in taken.left
        finally:
            for claim_id in claim_ids:
                self.liveness.release(claim_id)

    async def _run_together(self, declared: Job[Any], claims: Sequence[Claim]) -> None:
        """Run them in one transaction; should it fail, run each by itself, to find the guilty."""
        waiting = deque(await self._try_together(declared, claims) if len(claims) > 1 else claims)
        try:
            while waiting:
                held = waiting.popleft()
                with told_of(held):
                    await self._run(held)
        except asyncio.CancelledError:
            await self._settling.give_back_many(waiting)
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
                await self._settling.give_back_many(claims)
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

    async def _run(self, held: Claim) -> None:
        log.info("job.started", claim=str(held.claim_id), attempt=held.attempt + 1)
        self.liveness.limit(held.claim_id, held.timeout_s)
        try:
            ending = await self._work_until_cancelled(held)
            if ending is not None and ending.state in (State.FAILED, State.CANCELLED):
                await self._close(replace(held, is_cancelled=True))
        except asyncio.CancelledError:
            await self._settling.give_back(held)
            raise
        except ClaimLost:
            log.warning("job.claim_lost", claim=str(held.claim_id))
            return
        self.liveness.unlimit(held.claim_id)
        if ending is not None:
            steps.reached(Step.ENDING)
            await self._settling.settle(held, ending)
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
        """Do the job; None when its end is committed already, otherwise what has to be written."""
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
        except (ClaimLost, Cancelled):
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
