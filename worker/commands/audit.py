"""`bulwark audit`: who changed what."""

import asyncio
from typing import Annotated, Any

import typer

from db.ledger import audit as audit_ledger
from worker import listings
from worker.arguments import AsJson
from worker.command_group import quiet_settings
from worker.connection import open_ledger
from worker.reports import find_job
from worker.settings import Settings


def add_to(app: typer.Typer) -> None:
    app.command()(audit)


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

    listings.show_audit(asyncio.run(read(quiet_settings())), as_json=as_json)
