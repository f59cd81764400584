"""Enqueueing a window of transfers, after all that can be checked has been checked."""

import asyncio
import sys
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ValidationError
from typer import Argument

from db.registry import discover_models
from jobs._input import InPlace
from jobs._mover import require_teams
from jobs._producer import Enqueued
from jobs._sources.opened import Opened
from jobs._spooling import enqueue_opened
from jobs.transfer_window import TransferWindow
from worker import change_options as change
from worker import import_options as ask
from worker.accepted import follow_job, tell_accepted
from worker.arguments import JobOptions, told
from worker.command_group import quiet_settings
from worker.connection import open_ledger, open_producer
from worker.exit_codes import BadInput, first_problem
from worker.import_command import Import, check_mapping
from worker.import_file import declared_shape, import_file, stays_in_place
from worker.settings import Settings
from worker.transfer_options import FromAnywhere

File = Annotated[
    str,
    Argument(metavar="FILE", help="The transfers in order; as for import, - is stdin, or a URI."),
]


@dataclass(frozen=True, kw_only=True)
class WindowOptions(ask.ColumnOptions, JobOptions):
    """What `bulwark transfer-window` was told; each field is an argument or an option of it."""

    file: File
    map_: ask.Map = None
    set_: ask.Set = None
    where: ask.Where = None
    ignore: ask.Ignore = None
    ignore_unknown: ask.IgnoreUnknown = False
    from_anywhere: FromAnywhere = False
    expect_version: change.ExpectVersion = None
    atomic: change.Atomic = False
    max_rejects: ask.MaxRejects = None
    max_rows: change.MaxRows = None
    dry_run: change.DryRun = False
    chunk_rows: ask.ChunkRows = None
    format_: ask.FileFormat = None
    encoding: ask.Encoding = None
    delimiter: ask.Delimiter = None
    in_place: ask.InPlace = False
    spool: ask.Spool = False

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the payload but for the source."""
        return vars(self.columns) | told(
            from_anywhere=self.from_anywhere,
            atomic=self.atomic,
            max_rejects=self.max_rejects,
            max_rows=self.max_rows,
            dry_run=self.dry_run,
            chunk_rows=self.chunk_rows,
        )


def enqueue_window(given: WindowOptions) -> None:
    """Enqueue the window; then tell it, or follow it, as was asked for."""
    settings = quiet_settings()
    declared = declared_shape(given.format_, given.encoding, given.delimiter)
    stays = stays_in_place(in_place=given.in_place, spool=given.spool)
    with import_file(given.file, sys.stdin.buffer, in_place=given.in_place) as (file, uri):
        asked = Import("transfer", file, given.columns, in_place=stays, declared=declared, uri=uri)
        accepted = asyncio.run(_submit(settings, given, asked))
    if given.follow:
        follow_job(settings, accepted.job_id, as_json=given.as_json)
    else:
        tell_accepted(accepted, as_json=given.as_json)


async def _submit(settings: Settings, given: WindowOptions, asked: Import) -> Enqueued:
    """Check the input and its columns, then accept the job."""
    with await asyncio.to_thread(asked.open, settings.import_folders) as stored:
        opened = await asyncio.to_thread(asked.recognised, stored)
        try:
            return await _enqueue(settings, given, asked, opened, stored.name)
        except ValidationError as error:
            raise BadInput(first_problem(error)) from None


async def _enqueue(
    settings: Settings, given: WindowOptions, asked: Import, opened: Opened, name: str
) -> Enqueued:
    models = discover_models(settings.model_modules)
    columns = await asyncio.to_thread(lambda: opened.reader.columns)
    async with open_ledger(settings) as sessions:
        plan = await check_mapping(sessions, models, models.get(asked.model), asked, columns)
        require_teams(plan, from_anywhere=given.from_anywhere)
        async with open_producer(settings, sessions) as producer:
            if not asked.stays:
                return await enqueue_opened(
                    producer,
                    opened,
                    name,
                    given.fields,
                    payload_class=TransferWindow,
                    **given.terms,
                )
            shape = opened.layout.model_dump()
            source = InPlace(type="in_place", path=asked.place, **shape)
            payload = TransferWindow(**given.fields, source=source)
            return await producer.enqueue(payload, **given.terms)
