"""`bulwark transfer-window`: an ordered file of transfers."""

import typer

from worker.arguments import as_parameters
from worker.window_command import WindowOptions, enqueue_window


def add_to(app: typer.Typer) -> None:
    app.command()(transfer_window)


@as_parameters
def transfer_window(_: typer.Context, given: WindowOptions) -> None:
    """Carry out a file of transfers in its order, each with a verdict, or all together."""
    enqueue_window(given)
