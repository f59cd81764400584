"""Schedules in a worker: it wakes for the next slot and fires what is due, without a leader."""

import asyncio
from collections.abc import Mapping, Sequence
from uuid import UUID

import structlog
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.ledger import schedule as ledger
from db.ledger.schedule import Outcome, Slot, Standing
from db.retry import DATABASE_ERRORS, Fault, classify, describe
from db.transaction import brief, look
from jobs._declaration import Job, Payload
from jobs._discovery import Jobs
from jobs._errors import DeclarationError, JobError
from jobs._firing import Plan, fire_due
from jobs._nearest import did_you_mean
from jobs._producer import Producer
from jobs._schedule import Schedule
from worker.outage import Outage
from worker.settings import Settings, SettingsError, variable

MOST_WAIT_S = 30.0
"""How late, at most, a worker notices what others have declared."""
LEAST_WAIT_S = 0.25
"""How soon a worker looks again for a slot that another is just seeing to."""
log = structlog.get_logger("bulwark.schedule")


def plan_schedules(jobs: Jobs, settings: Settings) -> tuple[Plan, ...]:
    """The declared schedules as the settings have them.

    Raises SettingsError and DeclarationError for what cannot be, a time zone of no such name too.
    """
    for name in settings.schedules:
        if name not in jobs.schedules:
            near = did_you_mean(name, jobs.schedules)
            raise SettingsError([f"{variable('schedules')}: there is no schedule {name!r}{near}."])
    return tuple(_plan(*jobs.schedules[name], settings) for name in sorted(jobs.schedules))


def _plan(job: Job[Payload], declared: Schedule, settings: Settings) -> Plan:
    given = settings.schedules.get(declared.name, {})
    try:
        schedule = declared.overridden(given).with_payload_of(job.payload)
        assert isinstance(schedule.payload, Payload)
        plan = Plan(schedule, job.kind, schedule.payload, _awaited(schedule, settings))
        _ = plan.cron.zone
    except DeclarationError as error:
        if not given:
            raise
        raise SettingsError([f"{variable('schedules')}: {error}."]) from None
    return plan


def _awaited(schedule: Schedule, settings: Settings) -> str | None:
    """The variable that has to be set before the schedule is on; None if it is, or there is none.

    What is empty counts as not set.
    """
    awaited = schedule.off_until
    if awaited is None:
        return None
    if awaited not in Settings.model_fields:
        near = did_you_mean(awaited, Settings.model_fields)
        raise DeclarationError(
            f"schedule {schedule.name}: off_until {awaited!r} is no setting{near}"
        )
    return None if getattr(settings, awaited) not in (None, (), {}) else variable(awaited)


class Scheduler:
    """One worker's part in the schedules; any number may run, since each locks what it fires.

    What the worker that started last declares holds. Once that one has ended, the others declare
    theirs again, so that a schedule outlives whoever has changed it.
    """

    def __init__(
        self,
        worker_id: UUID,
        sessions: async_sessionmaker[AsyncSession],
        producer: Producer,
        plans: Sequence[Plan],
    ) -> None:
        self._worker_id = worker_id
        self._sessions = sessions
        self._producer = producer
        self._plans = plans
        self._has_declared = False
        self._outage = Outage(log, "schedule.failed", "schedule.back")
        self._outages = {
            plan.name: Outage(log, "schedule.failed", "schedule.back", schedule=plan.name)
            for plan in plans
        }

    async def run_forever(self) -> None:
        """Fire until cancelled; while PostgreSQL is away, say so and try again."""
        while self._plans:
            try:
                wait_s = await self.look_round()
            except DATABASE_ERRORS as error:
                wait_s = self._outage.fail(describe(error))
            else:
                self._outage.end()
            await asyncio.sleep(wait_s)  # a time that comes gives no sign

    async def look_round(self) -> float:
        """Fire what is due, and return the seconds until something is again."""
        standings = await self._declare(await look(self._sessions, ledger.standings))
        waits_s = [MOST_WAIT_S]
        for plan in self._plans:
            wait_s = _wait_s(plan, standings[plan.name])
            waits_s.append(await self._fire(plan) if wait_s <= 0 else wait_s)
        return max(LEAST_WAIT_S, min(waits_s))

    async def _declare(self, standings: Mapping[str, Standing]) -> Mapping[str, Standing]:
        """Declare, at the start, every schedule, and later what nobody else stands for any more."""
        due = [one.declaration for one in self._plans if self._has_to_declare(one, standings)]
        if not due:
            return standings
        await brief(
            self._sessions,
            lambda session: ledger.declare(session, due, self._worker_id),
            name="schedule.declare",
        )
        self._has_declared = True
        return await look(self._sessions, ledger.standings)

    def _has_to_declare(self, plan: Plan, standings: Mapping[str, Standing]) -> bool:
        standing = standings.get(plan.name)
        if standing is None or not self._has_declared:
            return True
        return not standing.has(plan.declaration) and not standing.declarer_lives

    async def _fire(self, plan: Plan) -> float:
        """Fire what is due of one schedule, and return when to look at it again.

        What keeps one from being fired does not keep the others.
        """
        try:
            slots = await brief(
                self._sessions,
                lambda session: fire_due(session, self._producer, plan, str(self._worker_id)),
                name="schedule.fire",
            )
        except (JobError, *DATABASE_ERRORS) as error:
            if classify(error) is Fault.OUTAGE:
                raise
            return self._outages[plan.name].fail(describe(error))
        self._outages[plan.name].end()
        _tell(plan, slots)
        return LEAST_WAIT_S


def _wait_s(plan: Plan, standing: Standing) -> float:
    """How long until its next slot, by PostgreSQL's clock."""
    if not plan.is_on or not standing.has(plan.declaration):
        return MOST_WAIT_S
    slot = plan.cron.first_after(standing.watermark)
    return MOST_WAIT_S if slot is None else (slot - standing.now).total_seconds()


def _tell(plan: Plan, slots: Sequence[Slot]) -> None:
    """Log what was committed."""
    missed = [slot.at.isoformat() for slot in slots if slot.outcome is Outcome.MISSED]
    if missed:
        log.warning(
            "schedule.missed",
            schedule=plan.name,
            slots=len(missed),
            first=missed[0],
            last=missed[-1],
        )
    for slot in slots:
        told = log.bind(schedule=plan.name, kind=plan.kind, slot=slot.at.isoformat())
        if slot.outcome is Outcome.FIRED:
            told.info("schedule.fired", job=str(slot.job_id), lag_s=round(slot.lag_s, 3))
        elif slot.outcome is Outcome.OVERLAPPED:
            told.warning("schedule.overlapped", lag_s=round(slot.lag_s, 3))
