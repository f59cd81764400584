"""The command `bulwark`: what each subcommand takes, and what it does with it."""

import asyncio
import sys
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar
from uuid import UUID

import typer

from db import migrations
from db.ledger import audit as audit_ledger
from db.ledger import parked as parked_ledger
from db.ledger.job import State
from db.registry import discover_models
from jobs._producer import Enqueued
from worker import demo as demonstration
from worker import development, listings
from worker import import_options as ask
from worker import main as worker_main
from worker import rejects as rejected_rows
from worker.command_group import CommandGroup, end
from worker.connection import Sessions, open_engine, open_ledger
from worker.display import following, make_console, say, show_job, to_json
from worker.exit_codes import ExitCode
from worker.health import check_health
from worker.import_command import Import, submit
from worker.import_file import declared_shape, import_file, stays_in_place
from worker.import_words import one_line, typed_options, what_and_where
from worker.logs import configure_logs
from worker.plan_command import plan_import
from worker.plan_display import show_plan
from worker.plan_document import ImportPlan
from worker.reports import JobReport, each_verdict, find_job, list_jobs, read_job, watch
from worker.requeueing import requeue_parked
from worker.settings import Settings, load_settings
from worker.watch_command import Told, Watching, tell_file, watch_folder

FOLLOW_INTERVAL_S = 0.25
T = TypeVar("T")


app = typer.Typer(
    name="bulwark",
    cls=CommandGroup,
    help="Bulk writes to PostgreSQL, each committed exactly once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JobId = Annotated[
    str, typer.Argument(metavar="ID", help="The job's id, or 8 or more of its first or last signs.")
]
AsJson = ask.AsJson
Follow = ask.Follow


def _quiet_settings() -> Settings:
    """The settings, for a command that tells its errors itself and logs none."""
    settings = load_settings()
    configure_logs("critical", settings.log_format)
    return settings


@app.command()
def worker() -> None:
    """Carry out jobs until told to stop."""
    worker_main.run_worker(load_settings())


@app.command()
def dev() -> None:
    """Run PostgreSQL, Valkey and a worker here, with nothing to set up; Ctrl-C ends them."""
    code = development.run_development(_quiet_settings(), say)
    if code is not None:
        end(f"The worker ended by itself with exit code {code}.", ExitCode.FAILED)


@app.command()
def demo(
    rows: Annotated[
        int, typer.Option(min=demonstration.LEAST_ROWS, help="How many heroes to import.")
    ] = demonstration.ROWS,
) -> None:
    """Show an import survive the death of its worker, on servers of its own."""
    configure_logs("critical")
    if not demonstration.run_demo(rows, make_console()):
        raise typer.Exit(ExitCode.FAILED)


@app.command()
def migrate() -> None:
    """Bring the database to the newest migration."""
    settings = _quiet_settings()
    before, head = asyncio.run(_revisions(settings))
    if before == head:
        say(f"The database is at migration {head} already.")
        return
    migrations.upgrade(settings.require_database())
    say(f"The database went from migration {before or 'none'} to {head}.")


async def _revisions(settings: Settings) -> tuple[str | None, str]:
    async with open_engine(settings) as engine, engine.connect() as connection:
        return await connection.run_sync(migrations.current_and_head)


@app.command("import")
@ask.as_parameters
def import_(ctx: typer.Context, given: ask.Given) -> None:
    """Enqueue the import of a file into a table."""
    typed = typed_options(ctx)
    what, where = what_and_where(given.model, given.file, given.watch, typed, plan=given.plan)
    declared = declared_shape(given.format_, given.encoding, given.delimiter)
    stays = stays_in_place(in_place=given.in_place, spool=given.spool)
    columns, options, terms = given.columns, given.options, given.terms
    with import_file(where, sys.stdin.buffer, in_place=given.in_place) as (file, uri):
        asked = Import(what, file, columns, options, terms, stays, declared=declared, uri=uri)
        if given.plan:
            _plan(asked, where, typed, as_json=given.as_json)
        elif given.watch is not None:
            watching = Watching(given.watch, asked, given.interval_s, given.once)
            _watch_folder(watching, as_json=given.as_json)
        else:
            _import(_quiet_settings(), asked, follow=given.follow, as_json=given.as_json)


def _import(settings: Settings, asked: Import, *, follow: bool, as_json: bool) -> None:
    accepted = asyncio.run(_submit(settings, asked))
    if follow:
        _follow(settings, accepted.job_id, as_json=as_json)
    else:
        _tell(accepted, as_json=as_json)


def _plan(asked: Import, file: str, typed: list[str], *, as_json: bool) -> None:
    async def make(settings: Settings) -> ImportPlan:
        async with open_ledger(settings) as sessions:
            return await plan_import(settings, sessions, asked, file, typed)

    show_plan(asyncio.run(make(_quiet_settings())), as_json=as_json)


def _watch_folder(watching: Watching, *, as_json: bool) -> None:
    """Tell on stdout what becomes of each file, and on stderr what is waited for."""
    watched = watch_folder(
        _quiet_settings(),
        watching,
        lambda told: tell_file(_on_one_line(told, as_json=as_json), as_json=as_json),
        lambda sentence: typer.echo(f"bulwark: {sentence}", err=True),
    )
    raise typer.Exit(asyncio.run(watched))


def _on_one_line(told: Told, *, as_json: bool) -> Told:
    return told if as_json else replace(told, file=one_line(told.file))


async def _submit(settings: Settings, asked: Import) -> Enqueued:
    async with open_ledger(settings) as sessions:
        return await submit(settings, sessions, asked)


def _tell(accepted: Enqueued, *, as_json: bool) -> None:
    if as_json:
        typer.echo(to_json({"job_id": accepted.job_id, "created": accepted.created}))
        return
    before = "" if accepted.created else " before, under this idempotency key,"
    say(f"Accepted{before} as job {accepted.job_id}.")
    say(f"See how it goes: bulwark job {accepted.job_id} --follow")


@app.command()
def jobs(
    state: Annotated[State | None, typer.Option(help="Only jobs in this state.")] = None,
    queue: Annotated[str | None, typer.Option(help="Only jobs of this queue.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, the newest first."""

    async def read(settings: Settings) -> list[dict[str, Any]]:
        async with open_ledger(settings) as sessions, sessions() as session:
            return await list_jobs(session, state=state, queue=queue, most=limit)

    listings.show_jobs(asyncio.run(read(_quiet_settings())), as_json=as_json)


@app.command()
def job(job_id: JobId, follow: Follow = False, as_json: AsJson = False) -> None:
    """Show one job: its state, its verdicts, and whether they add up."""
    settings = _quiet_settings()
    report = asyncio.run(_read_job(settings, job_id))
    if follow:
        _follow(settings, report.id, as_json=as_json)
    else:
        _show(report, as_json=as_json)


async def _read_job(settings: Settings, text: str) -> JobReport:
    async with open_ledger(settings) as sessions, sessions() as session:
        return await read_job(session, await find_job(session, text), settings.lost_after_s)


def _show(report: JobReport, *, as_json: bool) -> None:
    if as_json:
        typer.echo(to_json(report.as_json()))
    else:
        show_job(make_console(), report)


def _follow(settings: Settings, job_id: UUID, *, as_json: bool) -> None:
    """Show the progress on stderr and the end on stdout. Exits with 1 unless the job succeeded."""
    try:
        report = asyncio.run(_watch(settings, job_id))
    except KeyboardInterrupt:
        end(
            f"The job goes on; see it again with `bulwark job {job_id} --follow`.",
            ExitCode.INTERRUPTED,
        )
    _show(report, as_json=as_json)
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


@app.command()
def rejects(
    job_id: JobId,
    export: Annotated[
        str | None,
        typer.Option(
            *("--export", "--csv"),
            metavar="FILE",
            help="Write the rows as they came, to be mended; - is stdout.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many.", show_default="50, or all as JSON")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the rows that a job did not take, and why."""
    settings = _quiet_settings()
    if export is not None:
        asyncio.run(_export(settings, job_id, export))
        return
    asyncio.run(_show_rejects(settings, job_id, limit, as_json=as_json))


async def _show_rejects(settings: Settings, text: str, limit: int | None, *, as_json: bool) -> None:
    async with open_ledger(settings) as sessions:
        job_id = await _find(sessions, text)
        if as_json:
            async for one in each_verdict(sessions, job_id, limit):
                typer.echo(to_json(rejected_rows.as_json(job_id, one)))
        else:
            most = limit or listings.REJECTS_SHOWN
            found = [one async for one in each_verdict(sessions, job_id, most + 1)]
            listings.show_rejects(job_id, found, most)


async def _export(settings: Settings, text: str, place: str) -> None:
    async with open_ledger(settings) as sessions:
        job_id = await _find(sessions, text)
        if place == "-":
            await rejected_rows.export(sessions, job_id, sys.stdout.buffer)
            return
        written = await rejected_rows.export_to_file(sessions, job_id, Path(place))
    say(f"{written:,} rows are in {place}: mend them and import the file again.")


async def _find(sessions: Sessions, text: str) -> UUID:
    async with sessions() as session:
        return await find_job(session, text)


@app.command()
def audit(
    job_id: Annotated[
        str | None, typer.Option("--job", metavar="ID", help="Only what this job did.")
    ] = None,
    table: Annotated[str | None, typer.Option(help="Only what was done to this table.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show who changed what: the newest first, or one job from its beginning."""

    async def read(settings: Settings) -> list[Any]:
        async with open_ledger(settings) as sessions, sessions() as session:
            one = None if job_id is None else await find_job(session, job_id)
            return await audit_ledger.read_entries(
                session, job_id=one, table_name=table, most=limit
            )

    listings.show_audit(asyncio.run(read(_quiet_settings())), as_json=as_json)


@app.command()
def parked(
    queue: Annotated[str | None, typer.Option(help="Only messages of this queue.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    requeue: Annotated[
        int | None,
        typer.Option(metavar="NUMBER", help="Make this one a job now, and list nothing."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List messages of plain arq clients of which no job could be made, the newest first."""
    settings = _quiet_settings()
    if requeue is not None:
        _tell(asyncio.run(requeue_parked(settings, requeue)), as_json=as_json)
        return

    async def read() -> list[dict[str, Any]]:
        async with open_ledger(settings) as sessions, sessions() as session:
            return await parked_ledger.read_parked(session, queue=queue, most=limit)

    listings.show_parked(asyncio.run(read()), as_json=as_json)


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the models: their columns and keys, and what an import must give."""
    found = discover_models(_quiet_settings().model_modules)
    listings.show_models(found.values(), as_json=as_json)


@app.command()
def health(as_json: AsJson = False) -> None:
    """Tell whether servers and workers are fit; the exit code is 0 if so, otherwise 1."""
    found = asyncio.run(check_health(_quiet_settings()))
    listings.show_health(found, as_json=as_json)
    if not found.healthy:
        raise typer.Exit(ExitCode.FAILED)


if __name__ == "__main__":
    app()
