"""`bulwark migrate`: bring the database to the newest migration."""

import asyncio

import typer

from db import migrations
from worker.command_group import quiet_settings
from worker.connection import open_engine
from worker.display import say
from worker.settings import Settings


def add_to(app: typer.Typer) -> None:
    app.command()(migrate)


def migrate() -> None:
    """Bring the database to the newest migration."""
    settings = quiet_settings()
    before, head = asyncio.run(_revisions(settings))
    if before == head:
        say(f"The database is at migration {head} already.")
        return
    migrations.upgrade(settings.require_database())
    say(f"The database went from migration {before or 'none'} to {head}.")


async def _revisions(settings: Settings) -> tuple[str | None, str]:
    async with open_engine(settings) as engine, engine.connect() as connection:
        return await connection.run_sync(migrations.current_and_head)
