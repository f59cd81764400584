"""The command `bulwark`: what each subcommand takes, and what it does with it."""

import asyncio
import getpass
import sys
from contextlib import aclosing
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar
from uuid import UUID

import typer

from db import migrations
from db.ledger import audit as audit_ledger
from db.ledger.job import State
from db.registry import discover_models
from jobs._mapping import Request
from jobs._producer import Enqueued
from worker import demo as demonstration
from worker import development, listings
from worker import import_options as ask
from worker import main as worker_main
from worker import rejects as rejected_rows
from worker.command_group import CommandGroup, end
from worker.connection import Sessions, open_engine, open_ledger
from worker.display import following, make_console, say, show_job, to_json
from worker.exit_codes import BadInput, ExitCode
from worker.health import check_health
from worker.import_command import Import, pairs, submit
from worker.logs import configure_logs
from worker.reports import JobReport, each_verdict, find_job, list_jobs, read_job, watch
from worker.settings import Settings, load_settings

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
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Follow = Annotated[bool, typer.Option("--follow", help="Show the progress until the job ends.")]


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
def import_(
    *,
    model: ask.Model,
    file: ask.File,
    map_: ask.Map = None,
    set_: ask.Set = None,
    where: ask.Where = None,
    ignore: ask.Ignore = None,
    ignore_unknown: ask.IgnoreUnknown = False,
    on_conflict: ask.Conflict = ask.OnConflict.REJECT,
    on_invalid: ask.Invalid = ask.OnInvalid.REJECT,
    max_rejects: ask.MaxRejects = None,
    chunk_rows: ask.ChunkRows = None,
    in_place: ask.InPlace = False,
    idempotency_key: ask.IdempotencyKey = None,
    run_at: ask.RunAt = None,
    queue: ask.Queue = None,
    priority: ask.Priority = None,
    attempts: ask.Attempts = None,
    timeout_s: ask.TimeoutS = None,
    actor: ask.Actor = None,
    correlation_id: ask.CorrelationId = None,
    follow: Follow = False,
    as_json: AsJson = False,
) -> None:
    """Enqueue the import of a CSV file into a table."""
    columns = Request(
        map=pairs("--map", map_ or ()),
        constants={name: value or None for name, value in pairs("--set", set_ or ()).items()},
        where=pairs("--where", where or ()),
        ignore=ignore or (),
        ignore_unknown=ignore_unknown,
    )
    options = _given(
        on_conflict=on_conflict.value,
        on_invalid=on_invalid.value,
        max_rejects=max_rejects,
        chunk_rows=chunk_rows,
    )
    terms = _given(
        idempotency_key=idempotency_key,
        run_at=_instant(run_at),
        queue=queue,
        priority=priority,
        attempts=attempts,
        timeout_s=timeout_s,
        actor=actor or _login_name(),
        correlation_id=correlation_id,
    )
    asked = Import(model, file, columns, options, terms, in_place)
    _import(_quiet_settings(), asked, follow=follow, as_json=as_json)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _import(settings: Settings, asked: Import, *, follow: bool, as_json: bool) -> None:
    accepted = asyncio.run(_submit(settings, asked))
    if follow:
        _follow(settings, accepted.job_id, as_json=as_json)
    elif as_json:
        typer.echo(to_json({"job_id": accepted.job_id, "created": accepted.created}))
    else:
        _tell_accepted(accepted)


def _instant(text: str | None) -> datetime | None:
    try:
        return None if text is None else datetime.fromisoformat(text)
    except ValueError:
        raise BadInput(f"--run-at {text!r} is no ISO time such as 2030-12-31T23:00:00Z.") from None


def _login_name() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return None  # the user id has no name on this machine


async def _submit(settings: Settings, asked: Import) -> Enqueued:
    async with open_ledger(settings) as sessions:
        return await submit(settings, sessions, asked)


def _tell_accepted(accepted: Enqueued) -> None:
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
    csv: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Write the rows as they came, to be mended; - is stdout."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many.", show_default="50, or all as JSON")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the rows that a job did not take, and why."""
    settings = _quiet_settings()
    if csv is not None:
        asyncio.run(_export(settings, job_id, csv))
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
