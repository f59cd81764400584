"""Enqueueing the import of a file, after all that can be checked has been checked."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from pydantic import ValidationError

from db.catalog import read_facts
from db.registry import Model, Registry, discover_models
from jobs._input import InPlace
from jobs._mapping import Plan, Request
from jobs._parents import Parent
from jobs._planning import make_plan, require_given
from jobs._producer import Enqueued, Producer, Terms
from jobs._references import natural_key
from jobs._sources.format import Shape
from jobs._sources.object_store import ObjectSource
from jobs._sources.opened import Opened
from jobs._sources.place import ImportPlace, open_place, printable
from jobs._sources.source import FileSource, Text
from jobs._spooling import enqueue_opened
from jobs.insert_rows import InsertRows
from worker.connection import Sessions, open_producer
from worker.exit_codes import BadInput, first_problem
from worker.settings import Settings


@dataclass(frozen=True)
class Import:
    """An import as it was asked for; `options` are further fields of InsertRows.

    A `job_id` is given by whoever must get the same job whenever it asks again. `uri` names an
    object in place of the file. `in_place` is whether the worker reads the input where it is; if
    nothing is said it does so with objects only.
    """

    model: str
    file: Path
    columns: Request
    options: Mapping[str, Any] = field(default_factory=dict)
    terms: Mapping[str, Any] = field(default_factory=dict)
    in_place: bool | None = None
    job_id: UUID | None = None
    declared: Shape = field(default_factory=Shape)
    uri: str | None = None

    @property
    def stays(self) -> bool:
        """Whether the worker is to read the input where it is."""
        return self.uri is not None if self.in_place is None else self.in_place

    @property
    def place(self) -> str:
        """Where the input is."""
        return self.uri or str(self.file.absolute())

    def open(self, places: Sequence[ImportPlace] = ()) -> FileSource | ObjectSource:
        """Open it; what stays where it is only from the places, if any are named.

        A worker elsewhere has places of its own, so they are checked here only where there are
        some. Raises InputError.
        """
        return open_place(self.uri or str(self.file), (self.stays and places) or None)

    def recognised(self, stored: FileSource | ObjectSource) -> Opened:
        """What was opened, as what it is. Raises InputError when it cannot be used."""
        text = Text.of(stored, self.declared.encoding)
        return Opened.recognised(text, stored.name, self.declared)


def pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    """Read LEFT=RIGHT as often as it was given. Raises BadInput when one has no "=" or a twin."""
    found: dict[str, str] = {}
    for one in given:
        left, equals, right = one.partition("=")
        if not equals or not left:
            raise BadInput(f"{option} {one!r} is not of the form LEFT=RIGHT.")
        if left in found:
            raise BadInput(f"{option} names {left!r} twice: leave one out.")
        found[left] = right
    return found


def check_wishes(asked: Import) -> None:
    """Raise JobError or BadInput about options and terms with which no file could be imported."""
    Terms(**{name: value for name, value in asked.terms.items() if name != "idempotency_key"})
    try:
        InsertRows(**_request(asked, asked.model), rows=[])
    except ValidationError as error:
        raise BadInput(first_problem(error)) from None


def _request(asked: Import, table: str) -> dict[str, Any]:
    return {"table": table, **vars(asked.columns), **asked.options}


async def submit(settings: Settings, sessions: Sessions, asked: Import) -> Enqueued:
    """Check the model, the input, its columns and the mapping; then accept the job.

    Raises BadInput, JobError or BulwarkError about what is wrong, with nothing enqueued.
    """
    models = discover_models(settings.model_modules)
    model = models.get(asked.model)
    check_wishes(asked)
    with await asyncio.to_thread(asked.open, settings.import_folders) as stored:
        opened = await asyncio.to_thread(asked.recognised, stored)
        columns = await asyncio.to_thread(lambda: opened.reader.columns)
        await check_mapping(sessions, models, model, asked, columns)
        request = _request(asked, model.name)
        async with open_producer(settings, sessions) as producer:
            try:
                return await _enqueue(producer, asked, opened, stored.name, request)
            except ValidationError as error:
                raise BadInput(first_problem(error)) from None


async def _enqueue(
    producer: Producer, asked: Import, opened: Opened, name: str, request: dict[str, Any]
) -> Enqueued:
    if not asked.stays:
        terms = {"job_id": asked.job_id, **asked.terms}
        return await enqueue_opened(producer, opened, name, request, **terms)
    if (shown := printable(asked.place)) != asked.place:
        raise BadInput(
            f"The path {shown} is not UTF-8, and a job can name no other; rename the file, or "
            "leave --in-place out."
        )
    source = InPlace(type="in_place", path=asked.place, **opened.layout.model_dump())
    return await producer.enqueue(InsertRows(**request, source=source), **asked.terms)


async def check_mapping(
    sessions: Sessions, models: Registry, model: Model, asked: Import, columns: list[str]
) -> Plan:
    """What the columns come to. Refuses what the job would refuse before its first row."""
    async with sessions() as session:
        facts = await read_facts(session, model.table)
        plan = make_plan(asked.columns, columns, model.name, model.create, facts)
        require_given(asked.options.get("update", ()), plan, model.name)
        for reference in plan.references:
            to = models.get(reference.table)
            to_facts = await read_facts(session, to.table)
            parent = Parent(to, to_facts, natural_key(to.table, to_facts, reference.key))
            if asked.options.get("on_missing") == "create":
                parent.require_creatable(reference)
        return plan
