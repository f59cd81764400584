"""`bulwark audit`: who changed what; sealing it, verifying it, and handing it out whole."""

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from db.ledger import audit as audit_ledger
from jobs.seal_audit import SealAudit
from worker import audit_export, listings
from worker.accepted import enqueue_job
from worker.arguments import AsJson, JobOptions, Limit, as_parameters, told
from worker.audit_display import parse_heads, show_verification
from worker.audit_verification import verify as verify_audit
from worker.command_group import ListingGroup, quiet_settings
from worker.connection import open_ledger
from worker.display import say
from worker.exit_codes import BadInput, ExitCode, first_problem
from worker.reports import find_job
from worker.settings import Settings
from worker.whole_file import require_file

OneJob = Annotated[str | None, typer.Option("--job", metavar="ID", help="Only what this job did.")]


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(cls=ListingGroup, invoke_without_command=True)
    group.callback()(audit)
    for command in (export, seal, verify):
        group.command()(command)
    app.add_typer(group, name="audit")


def audit(
    ctx: typer.Context,
    job_id: OneJob = None,
    table: Annotated[str | None, typer.Option(help="Only what was done to this table.")] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """Show who changed what: the newest first, or one job from its beginning."""
    if ctx.invoked_subcommand is not None:
        return

    async def read(settings: Settings) -> list[Any]:
        async with open_ledger(settings) as sessions, sessions() as session:
            one = None if job_id is None else await find_job(session, job_id)
            return await audit_ledger.read_entries(
                session, job_id=one, table_name=table, most=limit
            )

    listings.show_audit(asyncio.run(read(quiet_settings())), as_json=as_json)


@dataclass(frozen=True, kw_only=True)
class GivenToSeal(JobOptions):
    """What `bulwark audit seal` was told."""

    segment_rows: Annotated[
        int | None, typer.Option(min=1, help="The rows of one segment, about.")
    ] = None


@as_parameters
def seal(_: typer.Context, given: GivenToSeal) -> None:
    """Seal now what is not sealed yet; a schedule does it every hour."""
    try:
        payload = SealAudit(**told(segment_rows=given.segment_rows))
    except ValidationError as error:
        raise BadInput(first_problem(error)) from None
    enqueue_job(payload, given)


def verify(
    job_id: Annotated[
        str | None, typer.Option("--job", metavar="ID", help="Only the rows about this job.")
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(metavar="SEGMENT:HASH", help="A head that was kept elsewhere. Repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Prove that nothing was altered in the audit, removed or slipped in since it was sealed."""
    settings, heads = quiet_settings(), parse_heads(head or ())

    async def check() -> Any:
        async with open_ledger(settings) as sessions:
            one = None
            if job_id is not None:
                async with sessions() as session:
                    one = await find_job(session, job_id)
            return await verify_audit(sessions, settings.seal_keys, heads, one)

    found = asyncio.run(check())
    show_verification(found, as_json=as_json)
    if not found.is_whole:
        raise typer.Exit(ExitCode.NOT_WHOLE)


def export(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where to; - is stdout.")] = "-",
    job_id: OneJob = None,
) -> None:
    """Write the whole audit as JSON lines, without sensitive values."""
    settings = quiet_settings()
    if file != "-":
        require_file(file)
    written = asyncio.run(_export(settings, job_id, file))
    if file != "-":
        say(f"{written:,} entries are in {file}.")


async def _export(settings: Settings, job_id: str | None, file: str) -> int:
    async with open_ledger(settings) as sessions:
        one = None
        if job_id is not None:
            async with sessions() as session:
                one = await find_job(session, job_id)
        if file == "-":
            return await audit_export.export(sessions, one, sys.stdout)
        return await audit_export.export_to_file(sessions, one, Path(file))
