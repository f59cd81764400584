"""`bulwark restore`: rows that are there."""

import typer

from jobs.restore_rows import RestoreRows
from worker.arguments import as_parameters
from worker.change_command import change
from worker.change_options import DeleteOptions


def add_to(app: typer.Typer) -> None:
    app.command()(restore)


@as_parameters
def restore(_: typer.Context, given: DeleteOptions) -> None:
    """Restore rows that were deleted softly, with what was deleted along with them."""
    change(RestoreRows, given)
