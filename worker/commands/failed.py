"""`bulwark failed`: the jobs that have failed for good."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from db.ledger.dead_letter import count_failed, read_failed
from worker import listings
from worker.arguments import AsJson, Limit
from worker.command_group import quiet_settings
from worker.connection import open_ledger
from worker.dead_letters import Asked, Kind, OfQueue, Since, WhyFailed

Found = tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]


def add_to(app: typer.Typer) -> None:
    app.command()(failed)


def failed(
    kind: Kind = None,
    reason: WhyFailed = None,
    queue: OfQueue = None,
    since: Since = None,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """List the jobs that have failed for good, the newest first, and why."""
    choice = Asked(kind=kind, reason=reason, queue=queue, since=since).choice
    settings = quiet_settings()

    async def read() -> Found:
        async with open_ledger(settings) as sessions, sessions() as session:
            found = await read_failed(session, choice, limit)
            return found, await count_failed(session, choice)

    listings.show_failed(*asyncio.run(read()), as_json=as_json)
