"""`bulwark show`: one row with all that belongs to it."""

import asyncio
from typing import Annotated

import typer

from db.reading.keys import Key, parse_key
from db.reading.rows import RowView, read_row
from db.registry import Model, Registry, discover_models
from worker.arguments import AsJson, Deleted, ModelName
from worker.command_group import quiet_settings
from worker.connection import open_ledger
from worker.exit_codes import BadInput
from worker.row_display import show_row
from worker.settings import Settings


def add_to(app: typer.Typer) -> None:
    app.command()(show)


def show(
    model: ModelName,
    key: Annotated[
        list[str], typer.Argument(metavar="KEY", help="Its key; of several columns all of them.")
    ],
    limit: Annotated[
        int, typer.Option(min=1, max=10_000, help="At most so many rows of each kind.")
    ] = 20,
    deleted: Deleted = False,
    as_json: AsJson = False,
) -> None:
    """Show a row, the rows that it refers to or that refer to it, and its audit."""

    async def read(settings: Settings, models: Registry, of: Model, named: Key) -> RowView | None:
        async with open_ledger(settings) as sessions, sessions() as session:
            return await read_row(session, models, of, named, most=limit, deleted=deleted)

    settings = quiet_settings()
    models = discover_models(settings.model_modules)
    of = models.get(model)
    found = asyncio.run(read(settings, models, of, parse_key(of, key)))
    if found is None:
        hint = "" if deleted else "; --deleted shows it if it is deleted"
        raise BadInput(f"There is no {of.name} {' '.join(key)}{hint}.")
    show_row(of, key, found, as_json=as_json)
