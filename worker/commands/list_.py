"""`bulwark list`: the rows of a model, page by page."""

import asyncio
from typing import Annotated

import typer

from db.reading.pages import Page, page
from db.registry import Model, discover_models
from worker.arguments import AsJson, Deleted, ModelName
from worker.command_group import quiet_settings
from worker.connection import open_ledger
from worker.row_display import show_page
from worker.settings import Settings


def add_to(app: typer.Typer) -> None:
    app.command("list")(list_rows)


def list_rows(
    model: ModelName,
    after: Annotated[
        str | None,
        typer.Option(metavar="CURSOR", help="Go on where the page ended that gave this cursor."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 20,
    deleted: Deleted = False,
    as_json: AsJson = False,
) -> None:
    """List the rows of a model in the order of their keys."""

    async def read(settings: Settings, of: Model) -> Page:
        async with open_ledger(settings) as sessions, sessions() as session:
            return await page(session, of, after=after, limit=limit, deleted=deleted)

    settings = quiet_settings()
    found = discover_models(settings.model_modules).get(model)
    again = ["--limit", str(limit), *(["--deleted"] if deleted else [])]
    show_page(found, asyncio.run(read(settings, found)), again, as_json=as_json)
