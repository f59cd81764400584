"""The options of `bulwark import`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from db.ledger.job import PRIORITY_LIMIT

Texts = list[str] | None


class OnConflict(StrEnum):
    """What becomes of rows that clash with those that are there."""

    REJECT = "reject"
    SKIP = "skip"


class OnInvalid(StrEnum):
    """Whether a reject ends the job."""

    REJECT = "reject"
    ABORT = "abort"


Model = Annotated[str, Argument(metavar="MODEL", help="The table, or its class.")]
File = Annotated[Path, Argument(metavar="FILE", help="CSV with a header, plain or gzip.")]
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
Invalid = Annotated[
    OnInvalid, Option("--on-invalid", help="Whether the first reject ends the job.")
]
MaxRejects = Annotated[
    int | None, Option("--max-rejects", min=0, help="End the job at one reject more.")
]
ChunkRows = Annotated[
    int | None, Option("--chunk-rows", min=1, max=100_000, help="The most rows of one transaction.")
]
InPlace = Annotated[bool, Option("--in-place", help="Let the worker read the file where it is.")]
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
