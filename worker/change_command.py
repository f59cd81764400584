"""Enqueueing a job that changes rows, after all that can be checked has been checked."""

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncSession

from db.registry import Model, discover_models
from jobs._discovery import discover_jobs
from jobs._filter import parse_filter
from jobs._input import InPlace
from jobs._mapping import Request
from jobs._producer import Enqueued
from jobs._selection import Selection, check_columns
from jobs._sources.opened import Opened
from jobs._spooling import enqueue_opened
from worker.accepted import enqueue_job, follow_job, tell_accepted
from worker.change_options import ChangeOptions
from worker.command_group import quiet_settings
from worker.connection import open_ledger, open_producer
from worker.exit_codes import BadInput, first_problem
from worker.import_command import Import
from worker.import_file import declared_shape, import_file, stays_in_place
from worker.settings import Settings

_NOTHING_ASKED = Request({}, {}, {}, (), False)


def change(
    payload_class: type[Selection],
    given: ChangeOptions,
    values: Mapping[str, Any] | None = None,
) -> None:
    """Enqueue the job of this payload on the rows that were named; then tell it, or follow it.

    `values` are those that all rows get; None for a job that gives none.
    """
    settings = quiet_settings()
    model = discover_models(settings.model_modules).get(given.model)
    asked = _Change(settings, payload_class, given, model, values)
    if given.file is None:
        if idle := given.about_a_file:
            raise BadInput(f"{', '.join(idle)}: that is about a FILE, and none is given.")
        payload = asked.payload()
        asyncio.run(asked.check(payload))
        enqueue_job(payload, given)
        return
    declared = declared_shape(given.format_, given.encoding, given.delimiter)
    stays = stays_in_place(in_place=given.in_place, spool=given.spool)
    with import_file(given.file, sys.stdin.buffer, in_place=given.in_place) as (file, uri):
        source = Import(
            model.name, file, _NOTHING_ASKED, in_place=stays, declared=declared, uri=uri
        )
        accepted = asyncio.run(asked.submit(source))
    if given.follow:
        follow_job(settings, accepted.job_id, as_json=given.as_json)
    else:
        tell_accepted(accepted, as_json=given.as_json)


@dataclass(frozen=True)
class _Change:
    settings: Settings
    payload_class: type[Selection]
    given: ChangeOptions
    model: Model
    values: Mapping[str, Any] | None

    @property
    def request(self) -> dict[str, Any]:
        return {"table": self.model.name, **self.given.fields}

    def payload(self, **source: Any) -> Selection:
        try:
            return self.payload_class(**self.request, **source)
        except ValidationError as error:
            raise BadInput(first_problem(error)) from None

    async def check(self, payload: Selection) -> None:
        """Raise InputError where the job would not begin; `payload` has no source."""
        columns = [column.name for column in self.model.table.primary_key]
        if payload.filter is not None:
            parse_filter(payload.filter, self.model)
        elif payload.key is not None:
            columns = payload.key
        async with open_ledger(self.settings) as sessions, sessions() as session:
            await self._check_columns(session, payload, columns)

    async def _check_columns(
        self, session: AsyncSession, payload: Selection, columns: Sequence[str]
    ) -> None:
        kind = discover_jobs(self.settings.job_modules).of(payload).kind
        await check_columns(session, self.model, payload, self.values, columns, kind)

    async def submit(self, source: Import) -> Enqueued:
        """Check the input and its columns, then accept the job."""
        with await asyncio.to_thread(source.open, self.settings.import_folders) as stored:
            opened = await asyncio.to_thread(source.recognised, stored)
            return await self._enqueue(source, opened, stored.name)

    async def _enqueue(self, source: Import, opened: Opened, name: str) -> Enqueued:
        shape = opened.layout.model_dump()
        payload = self.payload(source=InPlace(type="in_place", path=source.place, **shape))
        columns = await asyncio.to_thread(lambda: opened.reader.columns)
        async with open_ledger(self.settings) as sessions:
            async with sessions() as session:
                await self._check_columns(session, payload, columns)
            async with open_producer(self.settings, sessions) as producer:
                terms = self.given.terms
                if source.stays:
                    return await producer.enqueue(payload, **terms)
                made = self.payload_class
                return await enqueue_opened(
                    producer, opened, name, self.request, payload_class=made, **terms
                )
