"""`bulwark purge`: remove for good what was deleted softly, stop that, and let it go on."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncSession
from typer import Argument, Option

from db.ledger import halt
from db.transaction import transaction
from jobs._archive_format import ArchiveFormat
from jobs._sources.place import is_uri
from jobs.purge_deleted_rows import PurgeDeletedRows, purge_deleted_rows
from worker.accepted import enqueue_job
from worker.arguments import JobOptions, as_parameters, login_name, told
from worker.command_group import quiet_settings
from worker.connection import open_ledger
from worker.display import say, to_json
from worker.exit_codes import BadInput, first_problem

Tables = Annotated[
    list[str] | None,
    Argument(metavar="[TABLE]...", help="Tables or models; otherwise all that have a retention."),
]
RetentionDays = Annotated[
    list[str] | None,
    Option("--retention-days", metavar="TABLE=DAYS", help="In place of that of the settings."),
]
DryRun = Annotated[bool, Option("--dry-run", help="Count what would go, and change nothing.")]
MaxRows = Annotated[int | None, Option("--max-rows", min=1, help="The most rows that go.")]
ArchiveTo = Annotated[
    str | None,
    Option("--archive", metavar="PLACE", help="Write the rows into this folder or store first."),
]
ArchiveAs = Annotated[
    ArchiveFormat | None, Option("--archive-format", help="How archived rows are written.")
]
UntilTime = Annotated[
    str | None,
    Option("--until", metavar="TIME", help="Stop at this time of the day: '06:00 Europe/Berlin'."),
]
BatchRows = Annotated[
    int | None, Option("--batch-rows", min=1, max=100_000, help="The rows of the first batch.")
]
TargetS = Annotated[
    float | None, Option("--target-s", help="The seconds that one batch should take.")
]
MostLag = Annotated[
    int | None, Option("--most-lag-mib", min=0, help="Pause while a replica is further behind.")
]
Stop = Annotated[
    str | None,
    Option("--stop", metavar="REASON", help="Enqueue nothing; let all purges stop, and say why."),
]
Go = Annotated[bool, Option("--go", help="Enqueue nothing; let stopped purges go on.")]


def add_to(app: typer.Typer) -> None:
    app.command()(purge)


@dataclass(frozen=True, kw_only=True)
class Given(JobOptions):
    """What `bulwark purge` was told."""

    tables: Tables = None
    retention_days: RetentionDays = None
    dry_run: DryRun = False
    max_rows: MaxRows = None
    archive: ArchiveTo = None
    archive_format: ArchiveAs = None
    until: UntilTime = None
    batch_rows: BatchRows = None
    target_s: TargetS = None
    most_lag_mib: MostLag = None
    stop: Stop = None
    go: Go = False

    @property
    def request(self) -> dict[str, Any]:
        """What the payload takes."""
        archive = self.archive
        return told(
            tables=self.tables or None,
            retention_days=_days(self.retention_days or []),
            dry_run=self.dry_run,
            max_rows=self.max_rows,
            archive=archive
            if archive is None or is_uri(archive)
            else str(Path(archive).absolute()),
            archive_format=self.archive_format,
            until=self.until,
            batch_rows=self.batch_rows,
            target_s=self.target_s,
            most_lag_mib=self.most_lag_mib,
        )


@as_parameters
def purge(_: typer.Context, given: Given) -> None:
    """Remove for good what was deleted softly and is past its retention."""
    if given.go or given.stop is not None:
        _switch(given)
        return
    try:
        payload = PurgeDeletedRows.model_validate(given.request)
    except ValidationError as error:
        raise BadInput(first_problem(error)) from None
    enqueue_job(payload, given)


def _days(pairs: list[str]) -> dict[str, str]:
    split = [pair.partition("=") for pair in pairs]
    if wrong := [pair for pair, (_, equals, _) in zip(pairs, split, strict=True) if not equals]:
        raise BadInput(f"--retention-days {wrong[0]!r} is no TABLE=DAYS, such as hero=30.")
    return {name: days for name, _, days in split}


def _switch(given: Given) -> None:
    """Stop all purges or let them go on, and say so."""
    if given.go and given.stop is not None:
        raise BadInput("--stop and --go contradict each other; give one of them.")
    if given.stop is not None and not given.stop.strip():
        raise BadInput("--stop needs a reason, which others will read.")
    changed = asyncio.run(_change(given))
    if given.as_json:
        typer.echo(to_json({"stopped": given.stop is not None, "changed": changed}))
    elif given.stop is not None:
        say("Purges stop at their next batch; `bulwark purge --go` lets them go on.")
    else:
        say("Purges may go on." if changed else "Nobody had stopped the purges.")


async def _change(given: Given) -> bool:
    kind = purge_deleted_rows.kind

    async def change(session: AsyncSession) -> bool:
        if given.stop is None:
            return await halt.lift(session, kind)
        await halt.stop(session, kind, given.stop, given.actor or login_name())
        return True

    async with open_ledger(quiet_settings()) as sessions:
        return await transaction(sessions, change, name="purge.switch", receipted=True)
