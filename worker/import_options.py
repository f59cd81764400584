"""The options of `bulwark import`, and what they come to."""

import getpass
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import datetime
from enum import StrEnum
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from db.ledger.job import PRIORITY_LIMIT
from jobs._mapping import Request
from worker.exit_codes import BadInput
from worker.import_command import pairs

Texts = list[str] | None


class OnConflict(StrEnum):
    """What becomes of rows that clash with those that are there."""

    REJECT = "reject"
    SKIP = "skip"
    UPDATE = "update"


class OnDeleted(StrEnum):
    """What becomes of rows that would clash with one that was deleted."""

    INSERT = "insert"
    REVIVE = "revive"
    REJECT = "reject"


class OnMissing(StrEnum):
    """What becomes of rows that name a row of another table that is not there."""

    REJECT = "reject"
    CREATE = "create"
    NULL = "null"


class OnInvalid(StrEnum):
    """Whether a reject ends the job."""

    REJECT = "reject"
    ABORT = "abort"


class Format(StrEnum):
    """How the rows are written."""

    CSV = "csv"
    TSV = "tsv"
    NDJSON = "ndjson"
    PARQUET = "parquet"


Model = Annotated[str | None, Argument(metavar="MODEL", help="The table, or its class.")]
File = Annotated[
    str | None,
    Argument(
        metavar="FILE",
        help="CSV, TSV, NDJSON or Parquet, plain, gzip or zstd; - is stdin; or a URI: "
        "s3://bucket/key, gs://, az://, file://.",
    ),
]
FileFormat = Annotated[
    Format | None, Option("--format", help="How the rows are written, if the name does not say.")
]
Encoding = Annotated[
    str | None,
    Option("--encoding", metavar="NAME", help="Of text that is not UTF-8: utf-16, latin-1, ..."),
]
Delimiter = Annotated[
    str | None, Option("--delimiter", metavar="SIGN", help="What separates fields; \\t is a tab.")
]
Map = Annotated[
    Texts,
    Option(
        "--map",
        metavar="COLUMN=TARGET",
        help="TARGET is a field, or team.name for the team of that name; "
        "FIELD='{column}|{column}' makes a field from columns.",
    ),
]
Set = Annotated[
    Texts, Option("--set", metavar="FIELD=VALUE", help="Give a field the same value in every row.")
]
Where = Annotated[
    Texts, Option("--where", metavar="COLUMN=VALUE", help="Import only the rows that have it.")
]
Ignore = Annotated[Texts, Option("--ignore", metavar="COLUMN", help="Leave a column out.")]
IgnoreUnknown = Annotated[
    bool, Option("--ignore-unknown", help="Leave out every column that has no field.")
]
Conflict = Annotated[
    OnConflict, Option("--on-conflict", help="What becomes of rows that clash with those there.")
]
Update = Annotated[
    Texts,
    Option("--update", metavar="FIELD", help="Update only this field of a row that is there."),
]
ExpectVersion = Annotated[
    str | None,
    Option(
        "--expect-version",
        metavar="COLUMN",
        help="Update a row only if it still has the version in this column.",
    ),
]
Deleted = Annotated[
    OnDeleted, Option("--on-deleted", help="What becomes of rows that meet a deleted one.")
]
Missing = Annotated[
    OnMissing,
    Option("--on-missing", help="What becomes of rows that name, by --map, a row not there."),
]
Atomic = Annotated[
    bool, Option("--atomic", help="Insert all rows in one transaction, or none at all.")
]
Invalid = Annotated[
    OnInvalid, Option("--on-invalid", help="Whether the first reject ends the job.")
]
MaxRejects = Annotated[
    int | None, Option("--max-rejects", min=0, help="End the job at one reject more.")
]
ChunkRows = Annotated[
    int | None, Option("--chunk-rows", min=1, max=100_000, help="The most rows of one transaction.")
]
InPlace = Annotated[
    bool,
    Option("--in-place", help="Let the worker read the file where it is, as it does with a URI."),
]
Spool = Annotated[
    bool, Option("--spool", help="Store what a URI names in PostgreSQL, as is done with a file.")
]
IdempotencyKey = Annotated[
    str | None,
    Option("--idempotency-key", help="Accept the job once, however often this is repeated."),
]
RunAt = Annotated[
    str | None, Option("--run-at", metavar="ISO", help="Not before, as 2030-12-31T23:00:00+01:00.")
]
Queue = Annotated[str | None, Option("--queue", help="The queue to wait in.")]
Priority = Annotated[
    int | None,
    Option("--priority", min=-PRIORITY_LIMIT, max=PRIORITY_LIMIT, help="Higher runs first."),
]
Attempts = Annotated[
    int | None, Option("--attempts", min=1, max=1000, help="How often the job may fail.")
]
TimeoutS = Annotated[
    int | None, Option("--timeout-s", min=1, help="The seconds that one attempt may take.")
]
Actor = Annotated[
    str | None, Option("--actor", help="Whom the audit names; otherwise your login name.")
]
CorrelationId = Annotated[
    str | None, Option("--correlation-id", help="Your own id of what this belongs to.")
]
Plan = Annotated[
    bool,
    Option("--plan", help="Guess the rest, MODEL too, try the first rows, and write nothing."),
]
Watch = Annotated[
    Path | None,
    Option("--watch", metavar="FOLDER", help="Import each file that arrives there, once."),
]
Once = Annotated[bool, Option("--once", help="With --watch: take what is there, and end.")]
IntervalS = Annotated[
    float, Option("--interval-s", min=0.05, help="With --watch: the seconds between two looks.")
]
Follow = Annotated[bool, Option("--follow", help="Show the progress until the job ends.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON for programs.")]


@dataclass(frozen=True)
class Given:
    """What `bulwark import` was told; each field is an argument or an option of it."""

    model: Model = None
    file: File = None
    map_: Map = None
    set_: Set = None
    where: Where = None
    ignore: Ignore = None
    ignore_unknown: IgnoreUnknown = False
    on_conflict: Conflict = OnConflict.REJECT
    update: Update = None
    expect_version: ExpectVersion = None
    on_deleted: Deleted = OnDeleted.INSERT
    on_missing: Missing = OnMissing.REJECT
    atomic: Atomic = False
    on_invalid: Invalid = OnInvalid.REJECT
    max_rejects: MaxRejects = None
    chunk_rows: ChunkRows = None
    format_: FileFormat = None
    encoding: Encoding = None
    delimiter: Delimiter = None
    in_place: InPlace = False
    spool: Spool = False
    idempotency_key: IdempotencyKey = None
    run_at: RunAt = None
    queue: Queue = None
    priority: Priority = None
    attempts: Attempts = None
    timeout_s: TimeoutS = None
    actor: Actor = None
    correlation_id: CorrelationId = None
    plan: Plan = False
    watch: Watch = None
    once: Once = False
    interval_s: IntervalS = 5.0
    follow: Follow = False
    as_json: AsJson = False

    @property
    def columns(self) -> Request:
        """What the columns mean."""
        constants = pairs("--set", self.set_ or ())
        return Request(
            map=pairs("--map", self.map_ or ()),
            constants={name: value or None for name, value in constants.items()},
            where=pairs("--where", self.where or ()),
            ignore=self.ignore or (),
            ignore_unknown=self.ignore_unknown,
            expect_version=self.expect_version,
        )

    @property
    def options(self) -> dict[str, Any]:
        """Further fields of InsertRows."""
        return _told(
            on_conflict=self.on_conflict.value,
            update=self.update or None,
            on_deleted=self.on_deleted.value,
            on_missing=self.on_missing.value,
            atomic=self.atomic or None,
            on_invalid=self.on_invalid.value,
            max_rejects=self.max_rejects,
            chunk_rows=self.chunk_rows,
        )

    @property
    def terms(self) -> dict[str, Any]:
        """What `Producer.enqueue` takes."""
        return _told(
            idempotency_key=self.idempotency_key,
            run_at=instant(self.run_at),
            queue=self.queue,
            priority=self.priority,
            attempts=self.attempts,
            timeout_s=self.timeout_s,
            actor=self.actor or _login_name(),
            correlation_id=self.correlation_id,
        )


def _told(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def instant(text: str | None) -> datetime | None:
    """The time of --run-at. Raises BadInput."""
    try:
        return None if text is None else datetime.fromisoformat(text)
    except ValueError:
        raise BadInput(f"--run-at {text!r} is no ISO time such as 2030-12-31T23:00:00Z.") from None


def _login_name() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return None  # the user id has no name on this machine


def as_parameters(
    command: Callable[[typer.Context, Given], None],
) -> Callable[..., None]:
    """The command as Typer wants it: with a parameter for each field."""

    def called(ctx: typer.Context, **values: Any) -> None:
        command(ctx, Given(**values))

    first = Parameter("ctx", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    given = [
        Parameter(one.name, Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type)
        for one in fields(Given)
    ]
    called.__signature__ = Signature([first, *given])  # type: ignore[attr-defined]  # Typer reads it
    called.__doc__ = command.__doc__
    return called
