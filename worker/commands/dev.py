"""`bulwark dev`: servers and a worker of its own."""

import typer

from worker import development
from worker.command_group import end, quiet_settings
from worker.display import say
from worker.exit_codes import ExitCode


def add_to(app: typer.Typer) -> None:
    app.command()(dev)


def dev() -> None:
    """Run PostgreSQL, Valkey and a worker here, with nothing to set up; Ctrl-C ends them."""
    code = development.run_development(quiet_settings(), say)
    if code is not None:
        end(f"The worker ended by itself with exit code {code}.", ExitCode.FAILED)
