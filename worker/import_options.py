"""The options of `bulwark import`, and what they come to."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from jobs._mapping import Request
from worker.arguments import JobOptions, told
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


class ColumnOptions:
    """What the options say of columns, for a command that has these among its own."""

    map_: Texts
    set_: Texts
    where: Texts
    ignore: Texts
    ignore_unknown: bool
    expect_version: str | None

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


@dataclass(frozen=True, kw_only=True)
class Given(ColumnOptions, JobOptions):
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
    plan: Plan = False
    watch: Watch = None
    once: Once = False
    interval_s: IntervalS = 5.0

    @property
    def options(self) -> dict[str, Any]:
        """Further fields of InsertRows."""
        return told(
            on_conflict=self.on_conflict.value,
            update=self.update or None,
            on_deleted=self.on_deleted.value,
            on_missing=self.on_missing.value,
            atomic=self.atomic or None,
            on_invalid=self.on_invalid.value,
            max_rejects=self.max_rejects,
            chunk_rows=self.chunk_rows,
        )
