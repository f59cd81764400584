"""Which rows of a table a job changes: by their keys, from an input, or by a filter."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

from pydantic import Field, JsonValue, model_validator
from sqlalchemy.ext.asyncio import AsyncSession

from db.catalog import TableFacts, read_facts
from db.columns import OnParentDeleted
from db.dependents import NO_DEPENDENTS
from db.errors import UnknownModel
from db.overwriting import Effect
from db.registry import Model
from jobs._bulk_write import BulkWrite
from jobs._changer import Changer, require_changeable
from jobs._declaration import Payload
from jobs._dependents import read_dependents
from jobs._errors import InputError, Rejected
from jobs._filter import Filter, parse_filter
from jobs._input import InPlace, Input, Spooled, open_input
from jobs._mapping import Request
from jobs._patch import choose_key, patch_model
from jobs._planning import make_plan
from jobs._rules import Rules
from jobs._run import ChunkedRun
from jobs._selected_keys import open_selected


class Selection(Payload):
    """Rows that are there already, and how many may be changed in which way.

    `keys` are values of the key; `rows` and `source` give the key in each row; `filter` is what
    holds of the rows when the job first runs, by column: a value, a list of values, or operators
    such as {"lt": 18}. Rows that no longer fulfil it when it is their turn stay unchanged. The
    key is the primary key or another unique one, `key` tells which. `map`, `where`, `ignore` and
    `ignore_unknown` say what the columns of the input mean.
    `atomic` changes all rows in one transaction, or, at one reject more than `max_rejects`, none.
    At more rows than `max_rows` nothing is changed. A `dry_run` tells what would become of each
    row, by changing them in one transaction that is rolled back.
    """

    table: str
    keys: list[JsonValue] | None = None
    filter: dict[str, JsonValue] | None = None
    rows: list[dict[str, JsonValue]] | None = None
    source: Annotated[InPlace | Spooled, Field(discriminator="type")] | None = None
    key: list[str] | None = None
    map: dict[str, str] = {}
    where: dict[str, str] = {}
    ignore: list[str] = []
    ignore_unknown: bool = False
    expect_version: str | None = None
    atomic: bool = False
    max_rejects: Annotated[int, Field(ge=0)] | None = None
    max_rows: Annotated[int, Field(ge=0)] | None = None
    dry_run: bool = False
    chunk_rows: Annotated[int, Field(ge=1, le=100_000)] = 20_000
    chunk_bytes: Annotated[int, Field(ge=1024, le=8 * 1024 * 1024)] = 4 * 1024 * 1024

    @model_validator(mode="after")
    def _one_way(self) -> "Selection":
        ways = (self.keys, self.filter, self.rows, self.source)
        if sum(way is not None for way in ways) != 1:
            raise ValueError("give exactly one of keys, filter, rows and source")
        if self.filter is not None and not self.filter:
            raise ValueError("an empty filter means every row; name a column, such as the key")
        if self.filter is not None and self.key is not None:
            raise ValueError("a filter finds its rows without a key; leave out key")
        if self.keys is not None and self.key is not None and len(self.key) != 1:
            raise ValueError("keys are values of one column; give rows instead")
        return self

    @property
    def rules(self) -> Rules:
        """How the rows are to be changed."""
        most = 0 if self.atomic and self.max_rejects is None else self.max_rejects
        return Rules(
            self.chunk_rows,
            self.chunk_bytes,
            most,
            self.max_rows,
            atomic=self.atomic,
            dry_run=self.dry_run,
            partial=True,
        )

    def request(self, values: Mapping[str, Any]) -> Request:
        """What the columns mean, beside the values that are the same for all rows."""
        return Request(
            self.map,
            values,
            self.where,
            self.ignore,
            self.ignore_unknown,
            self.expect_version,
        )


@asynccontextmanager
async def changing(
    run: ChunkedRun,
    payload: Selection,
    effect: Effect,
    values: Mapping[str, Any] | None = None,
    references: Mapping[str, OnParentDeleted] | None = None,
) -> AsyncIterator[BulkWrite]:
    """The bulk write of the selected rows. Raises Rejected when they cannot be selected so."""
    try:
        model = run.models.get(payload.table)
    except UnknownModel as error:
        raise Rejected(str(error)) from None
    facts = await run.read(lambda session: read_facts(session, model.table))
    dependents = NO_DEPENDENTS
    if references is not None:
        if "deleted_at" not in model.table.c:
            raise Rejected(f"{model.name} keeps no deleted rows: it has no column deleted_at")
        dependents = await run.read(
            lambda session: read_dependents(session, run.models, model, references)
        )
    async with _open(run, payload, effect, model, facts) as (source, found):
        request = payload.request(values or {})
        key = choose_key(payload.key, request, source.columns, model, facts)

        writer = partial(
            Changer,
            effect=effect,
            key=key,
            kind=run.claim.kind,
            dependents=dependents,
            filter=found,
        )
        patched = patch_model(model, key, with_fields=values is not None)
        yield await BulkWrite.begin(run, payload.rules, request, patched, source, writer)


async def check_columns(
    session: AsyncSession,
    model: Model,
    payload: Selection,
    values: Mapping[str, Any] | None,
    columns: Sequence[str],
    kind: str,
) -> None:
    """Raise InputError about what the job of a kind would refuse before its first row."""
    facts = await read_facts(session, model.table)
    request = payload.request(values or {})
    key = choose_key(payload.key, request, columns, model, facts)
    create = patch_model(model, key, with_fields=values is not None).create
    plan = make_plan(request, columns, model.name, create, facts, partial=True)
    require_changeable(plan, key, model, kind, changes=values is not None)


@asynccontextmanager
async def _open(
    run: ChunkedRun, payload: Selection, effect: Effect, model: Model, facts: TableFacts
) -> AsyncIterator[tuple[Input, Filter | None]]:
    """The rows by their keys as an input, and the filter that they must still fulfil."""
    if payload.filter is not None:
        found = parse_filter(payload.filter, model)
        yield await open_selected(run, model, found, effect), found
        return
    rows = payload.rows
    if payload.keys is not None:
        (name,) = payload.key or _only(facts.primary_key, model)
        rows = [{name: value} for value in payload.keys]
    async with open_input(run, rows, payload.source, run.import_folders) as source:
        yield source, None


def _only(primary_key: tuple[str, ...], model: Model) -> tuple[str]:
    if len(primary_key) != 1:
        raise InputError(
            f"the key of {model.name} is {', '.join(primary_key) or 'none'}; give rows, or the one "
            "column that keys are values of"
        )
    return (primary_key[0],)
