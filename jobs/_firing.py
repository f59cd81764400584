"""Firing: a slot and its job are made in one transaction, whichever of many workers makes it."""

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from db.errors import AlreadyCommitted
from db.ledger import schedule as ledger
from db.ledger.schedule import Declaration, Outcome, Slot
from jobs._cron import Cron
from jobs._declaration import Payload
from jobs._errors import JobError
from jobs._producer import Producer, new_job_id
from jobs._schedule import MOST_AT_ONCE, Schedule


class Overlap(JobError):
    """The job that the schedule fired last has not ended."""


@dataclass(frozen=True)
class Plan:
    """A schedule as this process is set up. `awaits` is the setting that it needs and has not."""

    schedule: Schedule
    kind: str
    payload: Payload
    awaits: str | None = None

    @property
    def name(self) -> str:
        return self.schedule.name

    @property
    def is_on(self) -> bool:
        return self.off_because is None

    @property
    def off_because(self) -> str | None:
        """Why it is off; None if it is on."""
        if self.awaits is not None:
            return f"{self.awaits} is not set"
        return None if self.schedule.enabled else "it is not enabled"

    @cached_property
    def cron(self) -> Cron:
        return Cron(self.schedule.cron, self.schedule.timezone)

    @cached_property
    def declaration(self) -> Declaration:
        return Declaration(
            self.name, self.kind, self.schedule.cron, self.schedule.timezone, self.is_on
        )


async def fire_due(
    session: AsyncSession,
    producer: Producer,
    plan: Plan,
    fired_by: str,
    *,
    now: datetime | None = None,
) -> list[Slot]:
    """See to every slot that is due, once, in the caller's transaction.

    Nothing is done while another transaction sees to it, and for a schedule that is declared
    otherwise by now. `now` takes the place of PostgreSQL's clock.
    """
    watermark = await ledger.take(session, plan.declaration)
    if watermark is None:
        return []
    now = await ledger.clock(session) if now is None else now
    due = plan.cron.latest(watermark, now, MOST_AT_ONCE)
    if not due:
        return []
    fired = plan.schedule.to_fire(due, now)
    slots = [Slot(plan.name, at, Outcome.MISSED, now, fired_by) for at in due if at not in fired]
    slots += [await _fire(session, producer, plan, at, now, fired_by) for at in fired]
    await ledger.record(session, slots)
    await ledger.advance(session, plan.name, due[-1])
    return slots


async def fire_now(
    session: AsyncSession, producer: Producer, plan: Plan, person: str | None, job_id: UUID
) -> Slot:
    """Fire a slot of its own, beside those of the expression, whether the schedule is on or not.

    Raises Overlap where jobs of the schedule must not overlap and its last one has not ended;
    AlreadyCommitted when an earlier try has made the job.
    """
    await ledger.declare_if_new(session, plan.declaration)
    await ledger.wait_for(session, plan.name)
    if (made := await ledger.slot_of(session, plan.name, job_id)) is not None:
        raise AlreadyCommitted(made)
    if (running := await _in_the_way(session, plan)) is not None:
        raise Overlap(f"job {running}, which schedule {plan.name} fired last, has not ended")
    now = await ledger.clock(session)
    await _enqueue(session, producer, plan, now, actor=person, job_id=job_id)
    slot = Slot(plan.name, now, Outcome.MANUAL, now, person, job_id)
    await ledger.record(session, [slot])
    return slot


async def _fire(
    session: AsyncSession, producer: Producer, plan: Plan, at: datetime, now: datetime, by: str
) -> Slot:
    if await _in_the_way(session, plan) is not None:
        return Slot(plan.name, at, Outcome.OVERLAPPED, now, by)
    job_id = new_job_id()
    await _enqueue(session, producer, plan, at, actor=f"schedule:{plan.name}", job_id=job_id)
    return Slot(plan.name, at, Outcome.FIRED, now, by, job_id)


async def _in_the_way(session: AsyncSession, plan: Plan) -> UUID | None:
    """The job that has to end before another may be fired."""
    if plan.schedule.overlap == "queue":
        return None
    return await ledger.unfinished_job(session, plan.name)


async def _enqueue(
    session: AsyncSession,
    producer: Producer,
    plan: Plan,
    at: datetime,
    *,
    actor: str | None,
    job_id: UUID,
) -> None:
    await producer.enqueue(
        plan.payload,
        session=session,
        job_id=job_id,
        actor=actor,
        correlation_id=f"{plan.name}/{at.astimezone(UTC).isoformat()}",
    )
