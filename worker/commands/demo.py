"""`bulwark demo`: an import that survives the death of its worker."""

from typing import Annotated

import typer

from worker import demo as demonstration
from worker.display import make_console
from worker.exit_codes import ExitCode
from worker.logs import configure_logs


def add_to(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    rows: Annotated[
        int, typer.Option(min=demonstration.LEAST_ROWS, help="How many heroes to import.")
    ] = demonstration.ROWS,
) -> None:
    """Show an import survive the death of its worker, on servers of its own."""
    configure_logs("critical")
    if not demonstration.run_demo(rows, make_console()):
        raise typer.Exit(ExitCode.FAILED)
