"""Enqueueing the import of a file, after all that can be checked has been checked."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from db.catalog import TableFacts, read_facts
from db.registry import Model, Registry, discover_models
from jobs._input import InPlace
from jobs._mapping import Request, make_plan, natural_key
from jobs._producer import Enqueued, Terms
from jobs._sources.csv import CsvReader
from jobs._sources.source import FileSource
from jobs._spooling import enqueue_file
from jobs.insert_rows import InsertRows
from worker.connection import Sessions, open_producer
from worker.exit_codes import BadInput
from worker.settings import Settings


@dataclass(frozen=True)
class Import:
    """An import as it was asked for; `options` are further fields of InsertRows."""

    model: str
    file: Path
    columns: Request
    options: Mapping[str, Any] = field(default_factory=dict)
    terms: Mapping[str, Any] = field(default_factory=dict)
    in_place: bool = False


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


async def submit(settings: Settings, sessions: Sessions, asked: Import) -> Enqueued:
    """Check the model, the file, its header and the mapping; then accept the job.

    Raises BadInput, JobError or BulwarkError about what is wrong, with nothing enqueued.
    """
    models = discover_models(settings.model_modules)
    model = models.get(asked.model)
    Terms(**{name: value for name, value in asked.terms.items() if name != "idempotency_key"})
    columns = await asyncio.to_thread(_read_columns, asked, settings.import_folders)
    await _check_mapping(sessions, models, model, asked.columns, columns)
    request = {"table": model.name, **vars(asked.columns), **asked.options}
    async with open_producer(settings, sessions) as producer:
        try:
            if asked.in_place:
                payload = InsertRows(
                    **request, source=InPlace(type="in_place", path=str(asked.file.absolute()))
                )
                return await producer.enqueue(payload, **asked.terms)
            return await enqueue_file(producer, asked.file, request, **asked.terms)
        except ValidationError as error:
            raise BadInput(_first_problem(error)) from None


def _read_columns(asked: Import, import_folders: Sequence[Path]) -> list[str]:
    """The header of the file, which a worker may read in place only from the allowed folders.

    A worker elsewhere has folders of its own, so they are checked here only where there are some.
    """
    anywhere = [asked.file.resolve().parent]
    folders = import_folders if asked.in_place and import_folders else anywhere
    with FileSource(asked.file, folders) as source:
        return CsvReader(source).header().columns


async def _check_mapping(
    sessions: Sessions, models: Registry, model: Model, request: Request, columns: list[str]
) -> None:
    async with sessions() as session:
        facts = await read_facts(session, model.table)
        plan = make_plan(request, columns, model.name, model.create, facts)
        for reference in plan.references:
            parent = models.get(reference.table).table
            parent_facts: TableFacts = await read_facts(session, parent)
            natural_key(parent, parent_facts, reference.key)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, problem["loc"])) or "the request"
    return f"{place}: {problem['msg']}"
