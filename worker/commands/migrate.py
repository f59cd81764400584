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
    found = asyncio.run(_revisions(settings))
    if found.is_newer:
        say(
            f"The database is at migration {found.current}, which a newer program has made; "
            f"this one brings {found.head} and changes nothing."
        )
        return
    if found.suffices:
        say(f"The database is at migration {found.head} already.")
        return
    migrations.upgrade(settings.require_database())
    say(f"The database went from migration {found.current or 'none'} to {found.head}.")


async def _revisions(settings: Settings) -> migrations.Revisions:
    async with open_engine(settings) as engine, engine.connect() as connection:
        return await connection.run_sync(migrations.read_revisions)
