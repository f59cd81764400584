"""`bulwark limit`: how many jobs may wait in a queue."""

import asyncio
from typing import Annotated

import typer
from sqlalchemy.ext.asyncio import AsyncSession
from typer import Argument, Option

from db.ledger import depth
from db.ledger.depth import Depth
from db.transaction import transaction
from jobs._declaration import complaint
from worker import listings
from worker.arguments import Actor, AsJson, login_name
from worker.command_group import quiet_settings
from worker.connection import open_ledger
from worker.exit_codes import BadInput

QueueName = Annotated[
    str | None, Argument(metavar="[QUEUE]", help="The queue to set; otherwise all are listed.")
]
Most = Annotated[
    int | None,
    Option("--most", min=0, max=2_000_000_000, help="Turn producers away while so many jobs wait."),
]
AnyNumber = Annotated[bool, Option("--none", help="Let any number wait.")]


def add_to(app: typer.Typer) -> None:
    app.command()(limit)


def limit(
    queue: QueueName = None,
    most: Most = None,
    none: AnyNumber = False,
    actor: Actor = None,
    as_json: AsJson = False,
) -> None:
    """Show or set how many jobs may wait in a queue before producers are turned away."""
    if queue is None and (none or most is not None):
        raise BadInput("Name the queue whose limit is meant.")
    if queue is not None:
        if (most is None) != none:
            raise BadInput("Give either --most NUMBER or --none.")
        if problem := complaint({"queue": queue}):
            raise BadInput(problem)
    settings = quiet_settings()

    async def change(session: AsyncSession) -> list[Depth]:
        if queue is not None:
            await depth.set_limit(session, queue, most, actor or login_name())
        return await depth.read_depths(session)

    async def apply() -> list[Depth]:
        async with open_ledger(settings) as sessions:
            return await transaction(sessions, change, name="queue.limit", receipted=True)

    listings.show_depths(asyncio.run(apply()), as_json=as_json)
