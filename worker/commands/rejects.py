"""`bulwark rejects`: the rows that a job did not take."""

import asyncio
import sys
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from worker import listings
from worker import rejects as rejected_rows
from worker.arguments import MOST_LISTED, AsJson, JobId
from worker.command_group import quiet_settings
from worker.connection import Sessions, open_ledger
from worker.display import say, to_json
from worker.reports import each_verdict, find_job
from worker.settings import Settings
from worker.whole_file import require_file


def add_to(app: typer.Typer) -> None:
    app.command()(rejects)


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
        int | None,
        typer.Option(
            min=1, max=MOST_LISTED, help="At most so many.", show_default="50, or all as JSON"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the rows that a job did not take, and why."""
    settings = quiet_settings()
    if export is not None:
        if export != "-":
            require_file(export)
        asyncio.run(_export(settings, job_id, export))
        return
    asyncio.run(_show_rejects(settings, job_id, limit, as_json=as_json))


async def _show_rejects(settings: Settings, text: str, limit: int | None, *, as_json: bool) -> None:
    async with open_ledger(settings) as sessions:
        job_id = await _find(sessions, text)
        if as_json:
            async for one in each_verdict(sessions, job_id, limit, with_raw=False):
                typer.echo(to_json(rejected_rows.as_json(job_id, one)))
        else:
            most = limit or listings.REJECTS_SHOWN
            found = [one async for one in each_verdict(sessions, job_id, most + 1, with_raw=False)]
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
