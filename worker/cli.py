"""The command `bulwark`: every module of worker/commands adds its own to it."""

import typer

from worker.command_group import CommandGroup
from worker.commands import add_commands

app = typer.Typer(
    name="bulwark",
    cls=CommandGroup,
    help="Bulk writes to PostgreSQL, each committed exactly once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
add_commands(app)

if __name__ == "__main__":
    app()
