"""`bulwark job`: show one job."""

import asyncio

import typer

from worker.accepted import follow_job, show_report
from worker.arguments import AsJson, Follow, JobId
from worker.command_group import quiet_settings
from worker.connection import open_ledger
from worker.reports import JobReport, find_job, read_job
from worker.settings import Settings


def add_to(app: typer.Typer) -> None:
    app.command()(job)


def job(job_id: JobId, follow: Follow = False, as_json: AsJson = False) -> None:
    """Show one job: its state, its verdicts, and whether they add up."""
    settings = quiet_settings()
    report = asyncio.run(_read_job(settings, job_id))
    if follow:
        follow_job(settings, report.id, as_json=as_json)
    else:
        show_report(report, as_json=as_json)


async def _read_job(settings: Settings, text: str) -> JobReport:
    async with open_ledger(settings) as sessions, sessions() as session:
        return await read_job(session, await find_job(session, text), settings.lost_after_s)
