"""What there is to say about each schedule, as `bulwark schedule` shows it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger import schedule as ledger
from db.ledger.schedule import Standing
from jobs._firing import Plan


@dataclass(frozen=True)
class ScheduleReport:
    """One schedule: when it comes next, and what became of its last slot and that slot's job."""

    name: str
    kind: str
    cron: str
    timezone: str
    on: bool
    off_because: str | None
    next_at: datetime | None
    last_at: datetime | None = None
    outcome: str | None = None
    fired_at: datetime | None = None
    lag_s: float | None = None
    fired_by: str | None = None
    job_id: UUID | None = None
    state: str | None = None
    reason: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The document that `--json` promises."""
        return asdict(self)


_LAST = sa.text(
    """
    SELECT known.name, last.at AS last_at, last.outcome, last.fired_at,
           extract(epoch FROM last.lag)::float8 AS lag_s, last.fired_by, last.job_id,
           job.state, job.reason
      FROM bulwark.schedule AS known
     CROSS JOIN LATERAL (SELECT * FROM bulwark.slot AS slot WHERE slot.schedule = known.name
                          ORDER BY slot.at DESC LIMIT 1) AS last
      LEFT JOIN bulwark.job AS job ON job.id = last.job_id
    """
)


async def read_schedules(session: AsyncSession, plans: Sequence[Plan]) -> list[ScheduleReport]:
    """The schedules that are declared here, and those that once were, by name."""
    rows = (await session.execute(_LAST)).mappings().all()
    last = {row["name"]: {key: row[key] for key in row if key != "name"} for row in rows}
    standings = await ledger.standings(session)
    now = await ledger.clock(session)
    here = [
        _declared(plan, standings.get(plan.name), now, last.get(plan.name, {})) for plan in plans
    ]
    names = {plan.name for plan in plans}
    gone = [_gone(one, last.get(name, {})) for name, one in standings.items() if name not in names]
    return sorted([*here, *gone], key=lambda report: report.name)


def _declared(
    plan: Plan, standing: Standing | None, now: datetime, last: Mapping[str, Any]
) -> ScheduleReport:
    started = standing is not None and standing.has(plan.declaration)
    after = standing.watermark if standing is not None and started else now
    one = plan.schedule
    next_at = plan.cron.first_after(after) if plan.is_on else None
    return ScheduleReport(
        *(one.name, plan.kind, one.cron, one.timezone, plan.is_on, plan.off_because, next_at),
        **last,
    )


def _gone(standing: Standing, last: Mapping[str, Any]) -> ScheduleReport:
    one = standing.declared
    because = "no job declares it here"
    return ScheduleReport(
        *(one.name, one.kind, one.cron, one.time_zone, False, because, None), **last
    )
