"""`bulwark schedule`: the schedules, and firing one of them now."""

import asyncio
from typing import Annotated

import typer

from db.ledger.schedule import Slot
from db.transaction import transaction
from jobs._discovery import discover_jobs
from jobs._firing import Plan, fire_now
from jobs._nearest import did_you_mean
from jobs._producer import Enqueued, new_job_id
from worker import listings
from worker.accepted import follow_job, tell_accepted
from worker.arguments import AsJson, Follow, login_name
from worker.command_group import ListingGroup, quiet_settings
from worker.connection import open_ledger, open_producer
from worker.exit_codes import BadInput
from worker.schedule import plan_schedules
from worker.schedule_report import ScheduleReport, read_schedules
from worker.settings import Settings

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="The schedule, as `bulwark schedule` shows it.")
]
Actor = Annotated[
    str | None, typer.Option(help="Whom the slot and the audit name; otherwise your login name.")
]


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(cls=ListingGroup, invoke_without_command=True)
    group.callback()(schedule)
    group.command()(run)
    app.add_typer(group, name="schedule")


def schedule(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Show the schedules: when each comes next, and what became of its last slot."""
    if ctx.invoked_subcommand is None:
        listings.show_schedules(asyncio.run(_read(quiet_settings())), as_json=as_json)


def run(name: Name, actor: Actor = None, follow: Follow = False, as_json: AsJson = False) -> None:
    """Fire a schedule once, now; its own slots come as ever."""
    settings = quiet_settings()
    slot = asyncio.run(_fire(settings, _plan_named(settings, name), actor or login_name()))
    assert slot.job_id is not None
    if follow:
        follow_job(settings, slot.job_id, as_json=as_json)
    else:
        tell_accepted(Enqueued(slot.job_id, created=True), as_json=as_json)


async def _read(settings: Settings) -> list[ScheduleReport]:
    plans = _plans(settings)
    async with open_ledger(settings) as sessions, sessions() as session:
        return await read_schedules(session, plans)


def _plans(settings: Settings) -> tuple[Plan, ...]:
    return plan_schedules(discover_jobs(settings.job_modules), settings)


def _plan_named(settings: Settings, name: str) -> Plan:
    plans = {plan.name: plan for plan in _plans(settings)}
    if name not in plans:
        raise BadInput(f"There is no schedule {name!r}{did_you_mean(name, plans)}")
    if (awaited := plans[name].awaits) is not None:
        raise BadInput(f"The schedule {name} is off until {awaited} is set.")
    return plans[name]


async def _fire(settings: Settings, plan: Plan, person: str | None) -> Slot:
    job_id = new_job_id()
    async with (
        open_ledger(settings) as sessions,
        open_producer(settings, sessions) as producer,
    ):
        return await transaction(
            sessions,
            lambda session: fire_now(session, producer, plan, person, job_id),
            name="schedule.run",
            receipted=True,
        )
