"""Arguments and options that several commands take."""

import getpass
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from datetime import datetime
from inspect import Parameter, Signature
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from typer import Argument, Option

from db.ledger.job import PRIORITY_LIMIT
from worker.exit_codes import BadInput

PANEL = "Options of jobs"
T = TypeVar("T")

JobId = Annotated[
    str, Argument(metavar="ID", help="The job's id, or 8 or more of its first or last signs.")
]
ModelName = Annotated[str, Argument(metavar="MODEL", help="A table or its class.")]
Deleted = Annotated[bool, Option("--deleted", help="Deleted rows too.")]
IdempotencyKey = Annotated[
    str | None,
    Option(
        "--idempotency-key",
        help="Accept the job once, however often this is repeated.",
        rich_help_panel=PANEL,
    ),
]
RunAt = Annotated[
    str | None,
    Option(
        "--run-at",
        metavar="ISO",
        help="Not before, as 2030-12-31T23:00:00+01:00.",
        rich_help_panel=PANEL,
    ),
]
Queue = Annotated[
    str | None, Option("--queue", help="The queue to wait in.", rich_help_panel=PANEL)
]
Priority = Annotated[
    int | None,
    Option(
        "--priority",
        min=-PRIORITY_LIMIT,
        max=PRIORITY_LIMIT,
        help="Higher runs first.",
        rich_help_panel=PANEL,
    ),
]
Attempts = Annotated[
    int | None,
    Option(
        "--attempts", min=1, max=1000, help="How often the job may fail.", rich_help_panel=PANEL
    ),
]
TimeoutS = Annotated[
    int | None,
    Option(
        "--timeout-s", min=1, help="The seconds that one attempt may take.", rich_help_panel=PANEL
    ),
]
Actor = Annotated[
    str | None,
    Option(
        "--actor", help="Whom the audit names; otherwise your login name.", rich_help_panel=PANEL
    ),
]
CorrelationId = Annotated[
    str | None,
    Option("--correlation-id", help="Your own id of what this belongs to.", rich_help_panel=PANEL),
]
MOST_LISTED = 1_000_000_000
Limit = Annotated[int, Option("--limit", min=1, max=MOST_LISTED, help="At most so many.")]
Follow = Annotated[bool, Option("--follow", help="Show the progress until the job ends.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON for programs.")]


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """The options of every command that enqueues a job.

    A command's own arguments and options are fields of a subclass.
    """

    idempotency_key: IdempotencyKey = None
    run_at: RunAt = None
    queue: Queue = None
    priority: Priority = None
    attempts: Attempts = None
    timeout_s: TimeoutS = None
    actor: Actor = None
    correlation_id: CorrelationId = None
    follow: Follow = False
    as_json: AsJson = False

    @property
    def terms(self) -> dict[str, Any]:
        """What `Producer.enqueue` takes."""
        return told(
            idempotency_key=self.idempotency_key,
            run_at=instant(self.run_at),
            queue=self.queue,
            priority=self.priority,
            attempts=self.attempts,
            timeout_s=self.timeout_s,
            actor=self.actor or login_name(),
            correlation_id=self.correlation_id,
        )


def as_parameters(command: Callable[[typer.Context, T], None]) -> Callable[..., None]:
    """The command as Typer wants it: with a parameter for each field of its second one's class."""
    given_class: Any = list(get_type_hints(command, include_extras=True).values())[1]
    hints = get_type_hints(given_class, include_extras=True)

    def called(ctx: typer.Context, **values: Any) -> None:
        command(ctx, given_class(**values))

    first = Parameter("ctx", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    given = [
        Parameter(
            one.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if one.default is MISSING else one.default,
            annotation=hints[one.name],
        )
        for one in fields(given_class)
    ]
    called.__signature__ = Signature([first, *given])  # type: ignore[attr-defined]  # Typer reads it
    called.__name__, called.__doc__ = command.__name__, command.__doc__
    return called


def told(**values: Any) -> dict[str, Any]:
    """The values that were given."""
    return {name: value for name, value in values.items() if value is not None}


def instant(text: str | None) -> datetime | None:
    """The time of --run-at. Raises BadInput."""
    try:
        return None if text is None else datetime.fromisoformat(text)
    except ValueError:
        raise BadInput(f"--run-at {text!r} is no ISO time such as 2030-12-31T23:00:00Z.") from None


def login_name() -> str | None:
    """Who runs this process, if its user has a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return None  # the user id has no name on this machine
