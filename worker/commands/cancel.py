"""`bulwark cancel`: let a job go no further."""

import asyncio
from contextlib import aclosing
from typing import Annotated
from uuid import UUID

import typer
from typer import Option

from db.ledger.cancellation import cancel as cancel_job
from db.ledger.job import ENDED, State
from db.transaction import transaction
from worker.accepted import FOLLOW_INTERVAL_S, show_report
from worker.arguments import Actor, AsJson, JobId, login_name
from worker.command_group import quiet_settings
from worker.connection import Sessions, open_ledger
from worker.display import say, to_json
from worker.exit_codes import BadInput, ExitCode
from worker.reports import JobReport, find_job, read_job, watch
from worker.settings import Settings

AtOnce = Annotated[
    bool,
    Option("--now", help="Stop it wherever it is, and roll its open transaction back."),
]
Wait = Annotated[bool, Option("--wait", help="Wait until it has ended, and show what it did.")]


def add_to(app: typer.Typer) -> None:
    app.command()(cancel)


def cancel(
    job_id: JobId,
    now: AtOnce = False,
    wait: Wait = False,
    actor: Actor = None,
    as_json: AsJson = False,
) -> None:
    """Let a job go no further: at its next chunk, or at once."""
    settings = quiet_settings()
    report = asyncio.run(_cancel(settings, job_id, actor or login_name(), at_once=now, wait=wait))
    if wait:
        show_report(report, as_json=as_json)
        if report.state != State.CANCELLED:
            raise typer.Exit(ExitCode.FAILED)
    elif as_json:
        typer.echo(to_json({"job_id": report.id, "state": report.state}))
    else:
        say(_told(report, at_once=now))


async def _cancel(
    settings: Settings, text: str, actor: str | None, *, at_once: bool, wait: bool
) -> JobReport:
    async with open_ledger(settings) as sessions:
        async with sessions() as session:
            job_id = await find_job(session, text)
            before = await read_job(session, job_id, settings.lost_after_s)
        if before.ended and before.state != State.CANCELLED:
            raise BadInput(f"Job {job_id} has {before.state} already; there is nothing to cancel.")
        if not before.ended:
            await transaction(
                sessions,
                lambda session: cancel_job(session, job_id, actor, at_once=at_once),
                name="job.cancel",
                receipted=True,
            )
        return await _look(sessions, settings, job_id, wait=wait)


async def _look(sessions: Sessions, settings: Settings, job_id: UUID, *, wait: bool) -> JobReport:
    """The job as it is now or, to be waited for, as it has ended."""
    async with aclosing(
        watch(sessions, job_id, settings.lost_after_s, FOLLOW_INTERVAL_S)
    ) as reports:
        async for report in reports:
            if report.ended or not wait:
                break
    return report


def _told(report: JobReport, *, at_once: bool) -> str:
    see = f"See what it has committed: bulwark job {report.id}"
    if report.state in ENDED:
        said = "is cancelled" if report.state == State.CANCELLED else f"has {report.state}"
        return f"Job {report.id} {said}. {see}"
    if report.state == State.RUNNING:
        return f"Job {report.id} stops {'at once' if at_once else 'at its next chunk'}. {see}"
    if report.live_workers:
        return f"Job {report.id} runs no more; a worker counts what it has not reached. {see}"
    return f"Job {report.id} runs no more; it ends once a worker serves {report.queue}. {see}"
