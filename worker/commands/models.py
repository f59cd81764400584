"""`bulwark models`: list the models."""

import typer

from db.registry import discover_models
from worker import listings
from worker.arguments import AsJson
from worker.command_group import quiet_settings


def add_to(app: typer.Typer) -> None:
    app.command()(models)


def models(as_json: AsJson = False) -> None:
    """List the models: their columns and keys, and what an import must give."""
    found = discover_models(quiet_settings().model_modules)
    listings.show_models(found.values(), as_json=as_json)
