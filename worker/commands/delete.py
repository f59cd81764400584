"""`bulwark delete`: rows that are there."""

import typer

from jobs.soft_delete_rows import SoftDeleteRows
from worker.arguments import as_parameters
from worker.change_command import change
from worker.change_options import DeleteOptions


def add_to(app: typer.Typer) -> None:
    app.command()(delete)


@as_parameters
def delete(_: typer.Context, given: DeleteOptions) -> None:
    """Delete rows softly: they stay, and are no longer seen."""
    change(SoftDeleteRows, given)
