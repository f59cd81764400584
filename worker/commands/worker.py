"""`bulwark worker`: carry out jobs."""

import typer

from worker import main
from worker.settings import load_settings


def add_to(app: typer.Typer) -> None:
    app.command()(worker)


def worker() -> None:
    """Carry out jobs until told to stop."""
    main.run_worker(load_settings())
