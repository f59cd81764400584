"""Schedules and their slots: each slot is a row, made in one transaction with its job.

What is due is judged by PostgreSQL's clock, and under the lock of the schedule's row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import INTERVAL, TIMESTAMP
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

from db.ledger.job import ENDED, SCHEMA, job
from db.ledger.limits import BRIEF, limit

KEPT = timedelta(days=90)
"""How long a slot is kept; the last one of each schedule stays."""

_instant = TIMESTAMP(timezone=True)


class Outcome(StrEnum):
    """What became of a slot."""

    FIRED = "fired"
    MANUAL = "manual"
    MISSED = "missed"
    OVERLAPPED = "overlapped"


schedule = sa.Table(
    "schedule",
    SQLModel.metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("cron", sa.Text, nullable=False),
    sa.Column("time_zone", sa.Text, nullable=False),
    sa.Column("is_on", sa.Boolean, nullable=False),
    sa.Column("watermark", _instant, nullable=False),
    sa.Column("declared_by", sa.Uuid),
    sa.Column("declared_at", _instant, nullable=False, server_default=sa.func.now()),
    schema=SCHEMA,
)
slot = sa.Table(
    "slot",
    SQLModel.metadata,
    sa.Column("schedule", sa.Text, sa.ForeignKey(schedule.c.name), primary_key=True),
    sa.Column("at", _instant, primary_key=True),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("fired_at", _instant, nullable=False),
    sa.Column("lag", INTERVAL, sa.Computed("fired_at - at", persisted=True)),
    sa.Column("fired_by", sa.Text),
    sa.Column("job_id", sa.Uuid),
    sa.CheckConstraint(
        "outcome IN ('fired', 'manual', 'missed', 'overlapped')",
        name="outcome",
    ),
    sa.CheckConstraint("(outcome IN ('fired', 'manual')) = (job_id IS NOT NULL)", name="job"),
    sa.Index("ix_slot_at", "at"),
    schema=SCHEMA,
)


@dataclass(frozen=True)
class Declaration:
    """What a process knows of a schedule; when cron, zone or is_on change, it starts anew."""

    name: str
    kind: str
    cron: str
    time_zone: str
    is_on: bool


@dataclass(frozen=True)
class Standing:
    """A schedule's row at one moment. `declarer_lives` is false for one that no worker declared."""

    declared: Declaration
    watermark: datetime
    declarer_lives: bool
    now: datetime

    def has(self, other: Declaration) -> bool:
        """Whether what is declared has the same slots as the other."""
        mine = self.declared
        return (mine.cron, mine.time_zone, mine.is_on) == (other.cron, other.time_zone, other.is_on)


@dataclass(frozen=True)
class Slot:
    """What became of one slot, and who saw to it."""

    schedule: str
    at: datetime
    outcome: Outcome
    fired_at: datetime
    fired_by: str | None
    job_id: UUID | None = None

    @property
    def lag_s(self) -> float:
        return (self.fired_at - self.at).total_seconds()


_DECLARE = sa.text(
    """
    INSERT INTO bulwark.schedule AS known (name, kind, cron, time_zone, is_on, watermark,
                                           declared_by)
    VALUES (:name, :kind, :cron, :time_zone, :is_on, clock_timestamp(), :declared_by)
    ON CONFLICT (name) DO UPDATE
       SET kind = excluded.kind, cron = excluded.cron, time_zone = excluded.time_zone,
           is_on = excluded.is_on, declared_by = excluded.declared_by, declared_at = now(),
           watermark = CASE WHEN (known.cron, known.time_zone, known.is_on)
                               = (excluded.cron, excluded.time_zone, excluded.is_on)
                            THEN known.watermark
                            ELSE greatest(known.watermark, excluded.watermark) END
    """
)


async def declare(
    session: AsyncSession, declarations: Sequence[Declaration], worker_id: UUID
) -> None:
    """Say how these schedules are from now on.

    One that is new, was changed or was off starts now: what it missed before is no slot of its.
    """
    await limit(session, BRIEF)
    for one in sorted(declarations, key=lambda each: each.name):
        await session.execute(_DECLARE, {**vars(one), "declared_by": worker_id})


async def declare_if_new(session: AsyncSession, declaration: Declaration) -> None:
    """Make the row of a schedule that no worker has seen yet."""
    await session.execute(
        sa.text(
            """
            INSERT INTO bulwark.schedule (name, kind, cron, time_zone, is_on, watermark)
            VALUES (:name, :kind, :cron, :time_zone, :is_on, clock_timestamp())
            ON CONFLICT DO NOTHING
            """
        ),
        vars(declaration),
    )


_STANDINGS = sa.text(
    """
    SELECT known.name, known.kind, known.cron, known.time_zone, known.is_on, known.watermark,
           EXISTS (SELECT FROM bulwark.worker
                    WHERE id = known.declared_by AND ended_at IS NULL) AS declarer_lives,
           clock_timestamp() AS now
      FROM bulwark.schedule AS known
    """
)


async def standings(session: AsyncSession) -> dict[str, Standing]:
    """All schedules that were ever declared, by name."""
    rows = [dict(row) for row in (await session.execute(_STANDINGS)).mappings()]
    return {one["name"]: _standing(one) for one in rows}


def _standing(row: dict[str, Any]) -> Standing:
    watermark, declarer_lives, now = (
        row.pop(name) for name in ("watermark", "declarer_lives", "now")
    )
    return Standing(Declaration(**row), watermark, declarer_lives, now)


_TAKE = sa.text(
    """
    SELECT watermark FROM bulwark.schedule
     WHERE name = :name AND (cron, time_zone, is_on) = (:cron, :time_zone, :is_on)
       FOR NO KEY UPDATE SKIP LOCKED
    """
)


async def take(session: AsyncSession, declaration: Declaration) -> datetime | None:
    """Lock the schedule until the transaction ends and return its watermark.

    None when another transaction holds it, or it is declared otherwise by now.
    """
    await limit(session, BRIEF)
    watermark: datetime | None = await session.scalar(_TAKE, vars(declaration))
    return watermark


async def wait_for(session: AsyncSession, name: str) -> None:
    """Lock the schedule until the transaction ends, once nobody else holds it."""
    await limit(session, BRIEF)
    locking = sa.select(schedule.c.name).where(schedule.c.name == name)
    await session.execute(locking.with_for_update(key_share=True))


async def clock(session: AsyncSession) -> datetime:
    """The present moment, by PostgreSQL's clock."""
    now: datetime = (await session.execute(sa.select(sa.func.clock_timestamp()))).scalar_one()
    return now


async def unfinished_job(session: AsyncSession, name: str) -> UUID | None:
    """The job that the schedule fired last, unless it has ended; to be asked under the lock."""
    last = (
        sa.select(slot.c.job_id)
        .where(slot.c.schedule == name, slot.c.job_id.is_not(None))
        .order_by(slot.c.at.desc())
        .limit(1)
        .scalar_subquery()
    )
    found: UUID | None = await session.scalar(
        sa.select(job.c.id).where(job.c.id == last, job.c.state.not_in(ENDED))
    )
    return found


_SLOT_OF = sa.text(
    """
    SELECT schedule, at, outcome, fired_at, fired_by, job_id FROM bulwark.slot
     WHERE schedule = :name AND job_id = :job_id
    """
)


async def slot_of(session: AsyncSession, name: str, job_id: UUID) -> Slot | None:
    """The slot of the schedule that made this job."""
    found = await session.execute(_SLOT_OF, {"name": name, "job_id": job_id})
    row = found.one_or_none()
    return None if row is None else Slot(**{**row._mapping, "outcome": Outcome(row.outcome)})


async def record(session: AsyncSession, slots: Sequence[Slot]) -> None:
    """Write down what became of slots, in the transaction of their jobs."""
    await session.execute(sa.insert(slot), [vars(one) for one in slots])


async def advance(session: AsyncSession, name: str, watermark: datetime) -> None:
    """Let everything up to this instant be done with."""
    await session.execute(
        sa.update(schedule).where(schedule.c.name == name).values(watermark=watermark)
    )


_DROP_OLD = sa.text(
    """
    DELETE FROM bulwark.slot WHERE (schedule, at) IN (
        SELECT old.schedule, old.at FROM bulwark.slot AS old
         WHERE old.at < now() - :kept
           AND EXISTS (SELECT FROM bulwark.slot AS newer
                        WHERE newer.schedule = old.schedule AND newer.at > old.at)
         ORDER BY old.at LIMIT :most FOR UPDATE SKIP LOCKED)
    RETURNING at
    """
).bindparams(sa.bindparam("kept", type_=sa.Interval))


async def drop_old(session: AsyncSession, most: int) -> int:
    """Delete slots of long ago, a batch at a time; returns how many went."""
    gone = await session.execute(_DROP_OLD, {"kept": KEPT, "most": most})
    return len(gone.all())
