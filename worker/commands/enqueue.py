"""`bulwark enqueue`: a job of any kind, by its payload."""

from dataclasses import dataclass
from typing import Annotated

import typer
from pydantic import ValidationError
from typer import Argument

from jobs._discovery import discover_jobs
from worker.accepted import enqueue_job
from worker.arguments import JobOptions, as_parameters
from worker.command_group import quiet_settings
from worker.exit_codes import BadInput, first_problem

Kind = Annotated[str, Argument(metavar="KIND", help="The job's name, as `bulwark jobs` shows it.")]
PayloadText = Annotated[
    str, Argument(metavar="PAYLOAD", help="A JSON object, as the job's payload class describes it.")
]


def add_to(app: typer.Typer) -> None:
    app.command()(enqueue)


@dataclass(frozen=True, kw_only=True)
class Given(JobOptions):
    """What `bulwark enqueue` was told."""

    kind: Kind
    payload: PayloadText = "{}"


@as_parameters
def enqueue(_: typer.Context, given: Given) -> None:
    """Enqueue a job of any kind, one of your own too."""
    declared = discover_jobs(quiet_settings().job_modules)[given.kind]
    try:
        payload = declared.payload.model_validate_json(given.payload)
    except ValidationError as error:
        raise BadInput(first_problem(error)) from None
    enqueue_job(payload, given)
