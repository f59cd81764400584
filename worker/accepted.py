"""What a command says of a job: that it was accepted, how it goes, and how it ended."""

import asyncio
from contextlib import aclosing
from uuid import UUID

import typer

from db.ledger.job import State
from jobs._declaration import Payload
from jobs._producer import Enqueued
from worker.arguments import JobOptions
from worker.command_group import end, quiet_settings
from worker.connection import open_ledger, open_producer
from worker.display import following, make_console, say, show_job, to_json
from worker.exit_codes import ExitCode
from worker.reports import JobReport, watch
from worker.settings import Settings

FOLLOW_INTERVAL_S = 0.25


def enqueue_job(payload: Payload, given: JobOptions) -> None:
    """Accept the job; then say so, or follow it to its end, as was asked for."""
    settings = quiet_settings()
    accepted = asyncio.run(_enqueue(settings, payload, given))
    if given.follow:
        follow_job(settings, accepted.job_id, as_json=given.as_json)
    else:
        tell_accepted(accepted, as_json=given.as_json)


async def _enqueue(settings: Settings, payload: Payload, given: JobOptions) -> Enqueued:
    async with (
        open_ledger(settings) as sessions,
        open_producer(settings, sessions) as producer,
    ):
        return await producer.enqueue(payload, **given.terms)


def tell_accepted(accepted: Enqueued, *, as_json: bool) -> None:
    if as_json:
        typer.echo(to_json({"job_id": accepted.job_id, "created": accepted.created}))
        return
    before = "" if accepted.created else " before, under this idempotency key,"
    say(f"Accepted{before} as job {accepted.job_id}.")
    say(f"See how it goes: bulwark job {accepted.job_id} --follow")


def show_report(report: JobReport, *, as_json: bool) -> None:
    if as_json:
        typer.echo(to_json(report.as_json()))
    else:
        show_job(make_console(), report)


def follow_job(settings: Settings, job_id: UUID, *, as_json: bool) -> None:
    """Show the progress on stderr and the end on stdout. Exits with 1 unless the job succeeded."""
    try:
        report = asyncio.run(_watch(settings, job_id))
    except KeyboardInterrupt:
        end(
            f"The job goes on; see it again with `bulwark job {job_id} --follow`.",
            ExitCode.INTERRUPTED,
        )
    show_report(report, as_json=as_json)
    if report.state != State.SUCCEEDED:
        raise typer.Exit(ExitCode.FAILED)


async def _watch(settings: Settings, job_id: UUID) -> JobReport:
    async with open_ledger(settings) as sessions:
        reports = watch(sessions, job_id, settings.lost_after_s, FOLLOW_INTERVAL_S)
        with following(make_console(stderr=True)) as follower:
            async with aclosing(reports):
                async for report in reports:
                    follower.show(report)
    return report
