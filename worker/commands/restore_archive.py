"""`bulwark restore-archive`: put back what a purge has archived."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from jobs._sources.place import is_uri
from jobs.restore_archive import RestoreArchive
from worker.accepted import enqueue_job
from worker.arguments import JobOptions, as_parameters

Place = Annotated[
    str, Argument(metavar="ARCHIVE", help="The folder or URI in which the manifest is.")
]
Tables = Annotated[list[str] | None, Option("--table", help="Only rows of this table. Repeatable.")]
DryRun = Annotated[bool, Option("--dry-run", help="Read and check all, and change nothing.")]


def add_to(app: typer.Typer) -> None:
    app.command("restore-archive")(restore_archive)


@dataclass(frozen=True, kw_only=True)
class Given(JobOptions):
    """What `bulwark restore-archive` was told."""

    archive: Place
    table: Tables = None
    dry_run: DryRun = False


@as_parameters
def restore_archive(_: typer.Context, given: Given) -> None:
    """Put back the rows of an archive, still deleted as they were."""
    place = given.archive if is_uri(given.archive) else str(Path(given.archive).absolute())
    payload = RestoreArchive(archive=place, tables=given.table or None, dry_run=given.dry_run)
    enqueue_job(payload, given)
