"""`bulwark update`: rows that are there."""

import typer

from jobs.update_rows import UpdateRows
from worker.arguments import as_parameters
from worker.change_command import change
from worker.change_options import UpdateOptions


def add_to(app: typer.Typer) -> None:
    app.command()(update)


@as_parameters
def update(_: typer.Context, given: UpdateOptions) -> None:
    """Change columns of rows that are there, by key, by filter, or by a file of patches."""
    change(UpdateRows, given, given.fields["values"])
