"""`bulwark jobs`: list jobs."""

import asyncio
from typing import Annotated, Any

import typer

from db.ledger.job import State
from worker import listings
from worker.arguments import AsJson, Limit
from worker.command_group import quiet_settings
from worker.connection import open_ledger
from worker.reports import list_jobs
from worker.settings import Settings


def add_to(app: typer.Typer) -> None:
    app.command()(jobs)


def jobs(
    state: Annotated[State | None, typer.Option(help="Only jobs in this state.")] = None,
    queue: Annotated[str | None, typer.Option(help="Only jobs of this queue.")] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, the newest first."""

    async def read(settings: Settings) -> list[dict[str, Any]]:
        async with open_ledger(settings) as sessions, sessions() as session:
            return await list_jobs(session, state=state, queue=queue, most=limit)

    listings.show_jobs(asyncio.run(read(quiet_settings())), as_json=as_json)
