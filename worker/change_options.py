"""The options of commands that change rows which are there, and what they come to."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from typer import Argument, Option

from worker import import_options as ask
from worker.arguments import JobOptions, told
from worker.exit_codes import BadInput
from worker.import_command import pairs

_CONDITION = re.compile(r"(\w+)\s*(<=|>=|!=|=|<|>|~)(.*)", re.DOTALL)
_ABOUT_A_FILE = (
    *("map_", "where", "ignore", "ignore_unknown", "expect_version"),
    *("format_", "encoding", "delimiter", "in_place", "spool"),
)
_OPERATORS = {"=": "eq", "!=": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge", "~": "like"}

Model = Annotated[str, Argument(metavar="MODEL", help="The table, or its class.")]
Rows = Annotated[
    ask.Texts, Option("--row", metavar="KEY", help="The row with this key. Repeatable.")
]
Filter = Annotated[
    ask.Texts,
    Option(
        "--filter",
        metavar="CONDITION",
        help="The rows that fulfil it: age>=18, email=, name~'A%'. Repeatable: all of them.",
    ),
]
Key = Annotated[
    ask.Texts,
    Option(
        "--key",
        metavar="COLUMN",
        help="What names a row, if that is not the primary key. Repeatable.",
    ),
]
ExpectVersion = Annotated[
    str | None,
    Option(
        "--expect-version",
        metavar="COLUMN",
        help="Change a row only if it still has the version in this column.",
    ),
]
Atomic = Annotated[
    bool, Option("--atomic", help="Change all rows in one transaction, or none at all.")
]
MaxRows = Annotated[
    int | None, Option("--max-rows", min=0, help="At more rows than this change nothing.")
]
DryRun = Annotated[
    bool, Option("--dry-run", help="Tell what would become of each row, and change nothing.")
]
Set = Annotated[
    ask.Texts, Option("--set", metavar="FIELD=VALUE", help="The new value of a field. Repeatable.")
]
References = Annotated[
    ask.Texts,
    Option(
        "--references",
        metavar="NAME=WHAT",
        help="What becomes of rows that refer so, as hero.team_id=cascade: refuse, cascade or "
        "leave. Repeatable.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class ChangeOptions(JobOptions):
    """Which rows are meant; each field is an argument or an option."""

    model: Model
    file: ask.File = None
    row: Rows = None
    filter_: Filter = None
    key: Key = None
    map_: ask.Map = None
    where: ask.Where = None
    ignore: ask.Ignore = None
    ignore_unknown: ask.IgnoreUnknown = False
    expect_version: ExpectVersion = None
    atomic: Atomic = False
    max_rejects: ask.MaxRejects = None
    max_rows: MaxRows = None
    dry_run: DryRun = False
    chunk_rows: ask.ChunkRows = None
    format_: ask.FileFormat = None
    encoding: ask.Encoding = None
    delimiter: ask.Delimiter = None
    in_place: ask.InPlace = False
    spool: ask.Spool = False

    @property
    def about_a_file(self) -> list[str]:
        """The options given that say what a file is, or how it is read."""
        return [
            f"--{name.strip('_').replace('_', '-')}"
            for name in _ABOUT_A_FILE
            if getattr(self, name) not in (None, False)
        ]

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the payload but for the table and the source."""
        return told(
            keys=self.row,
            filter=conditions(self.filter_) if self.filter_ else None,
            key=self.key,
            map=pairs("--map", self.map_ or ()),
            where=pairs("--where", self.where or ()),
            ignore=self.ignore or [],
            ignore_unknown=self.ignore_unknown,
            expect_version=self.expect_version,
            atomic=self.atomic,
            max_rejects=self.max_rejects,
            max_rows=self.max_rows,
            dry_run=self.dry_run,
            chunk_rows=self.chunk_rows,
        )


@dataclass(frozen=True, kw_only=True)
class UpdateOptions(ChangeOptions):
    """What `bulwark update` was told."""

    set_: Set = None

    @property
    def fields(self) -> dict[str, Any]:
        values = {name: value or None for name, value in pairs("--set", self.set_ or ()).items()}
        return {**super().fields, "values": values}


@dataclass(frozen=True, kw_only=True)
class DeleteOptions(ChangeOptions):
    """What `bulwark delete` or `bulwark restore` was told."""

    references: References = None

    @property
    def fields(self) -> dict[str, Any]:
        return {**super().fields, "references": pairs("--references", self.references or ())}


def conditions(given: list[str]) -> dict[str, Any]:
    """A filter, of conditions such as age>=18; nothing behind a sign is null. Raises BadInput."""
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        match = _CONDITION.fullmatch(text)
        if match is None:
            signs = " ".join(_OPERATORS)
            raise BadInput(f"--filter {text!r} is no condition such as age>=18; the signs: {signs}")
        column, sign, value = match.groups()
        if _OPERATORS[sign] in found.setdefault(column, {}):
            raise BadInput(f"--filter compares {column} by {sign} twice: leave one out.")
        found[column][_OPERATORS[sign]] = value.strip() or None
    return found
