"""`bulwark health`: whether servers and workers are fit."""

import asyncio
from typing import Annotated

import typer

from worker import listings
from worker.arguments import AsJson
from worker.command_group import quiet_settings
from worker.exit_codes import ExitCode
from worker.health import check_health


def add_to(app: typer.Typer) -> None:
    app.command()(health)


def health(
    here: Annotated[
        bool, typer.Option("--here", help="Demand a living worker of this host, for a probe.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tell whether servers and workers are fit; the exit code is 0 if so, otherwise 1."""
    found = asyncio.run(check_health(quiet_settings(), here=here))
    listings.show_health(found, as_json=as_json)
    if not found.healthy:
        raise typer.Exit(ExitCode.FAILED)
