"""`bulwark parked`: messages of which no job could be made."""

import asyncio
from typing import Annotated, Any

import typer

from db.ledger import parked as parked_ledger
from worker import listings
from worker.accepted import tell_accepted
from worker.arguments import AsJson, Limit
from worker.command_group import quiet_settings
from worker.connection import open_ledger
from worker.requeueing import requeue_parked


def add_to(app: typer.Typer) -> None:
    app.command()(parked)


def parked(
    queue: Annotated[str | None, typer.Option(help="Only messages of this queue.")] = None,
    limit: Limit = 20,
    requeue: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER", max=2**63 - 1, help="Make this one a job now, and list nothing."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List messages of plain arq clients of which no job could be made, the newest first."""
    settings = quiet_settings()
    if requeue is not None:
        tell_accepted(asyncio.run(requeue_parked(settings, requeue)), as_json=as_json)
        return

    async def read() -> list[dict[str, Any]]:
        async with open_ledger(settings) as sessions, sessions() as session:
            return await parked_ledger.read_parked(session, queue=queue, most=limit)

    listings.show_parked(asyncio.run(read()), as_json=as_json)
