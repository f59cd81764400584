"""Insert rows into any registered table, each validated by the model's Create class."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from db.errors import UnknownModel
from jobs._bulk_write import BulkWrite
from jobs._declaration import Outcome, chunked_job
from jobs._errors import Rejected
from jobs._input import InPlace, Spooled, open_input
from jobs._inserter import Clashes, Inserter
from jobs._mapped import MappedInput
from jobs._rules import Rules
from jobs._run import ChunkedRun


class InsertRows(MappedInput):
    """What to insert, from where, and what to do about rows that do not fit.

    `map`, `constants`, `where`, `ignore` and `ignore_unknown` say what the columns mean.
    `on_conflict` is about rows that clash with a unique index: reject them, skip them, or update
    what is there, in the columns of `update` or in all that the row gives. A row that gives
    `expect_version`, the name of a column, takes effect only on that version of its row.
    `on_deleted` is about rows that would clash with one that was deleted: insert them anew, revive
    the latest, or reject them. `on_missing` is about the rows of other tables that a row names.
    `atomic` inserts everything in one transaction, or, at one reject more than `max_rejects`, which
    is none unless it is given, nothing at all.
    `on_invalid` abort ends the job at the first reject, `max_rejects` at the first one too many.
    """

    table: str
    rows: list[dict[str, JsonValue]] | None = None
    source: Annotated[InPlace | Spooled, Field(discriminator="type")] | None = None
    on_conflict: Literal["reject", "skip", "update"] = "reject"
    update: list[str] | None = None
    on_deleted: Literal["insert", "revive", "reject"] = "insert"
    on_missing: Literal["reject", "create", "null"] = "reject"
    atomic: bool = False
    on_invalid: Literal["reject", "abort"] = "reject"
    max_rejects: Annotated[int, Field(ge=0)] | None = None
    chunk_rows: Annotated[int, Field(ge=1, le=100_000)] = 20_000
    chunk_bytes: Annotated[int, Field(ge=1024, le=8 * 1024 * 1024)] = 4 * 1024 * 1024

    @model_validator(mode="after")
    def _one_input(self) -> "InsertRows":
        if (self.rows is None) == (self.source is None):
            raise ValueError("give either rows or a source")
        if self.on_conflict != "update" and (self.update is not None or self.expect_version):
            raise ValueError("--update and --expect-version need --on-conflict update")
        return self

    @property
    def rules(self) -> Rules:
        """How the rows are to be inserted; to abort at the first reject is to allow none."""
        most = 0 if self.on_invalid == "abort" else self.max_rejects
        if self.atomic and most is None:
            most = 0
        return Rules(
            self.chunk_rows,
            self.chunk_bytes,
            most,
            on_missing=self.on_missing,
            update=self._updated,
            atomic=self.atomic,
        )

    @property
    def clashes(self) -> Clashes:
        """What becomes of rows that meet others."""
        expects = self.expect_version is not None
        return Clashes(self.on_conflict, self.on_deleted, self._updated, expects)

    @property
    def _updated(self) -> frozenset[str] | None:
        return None if self.update is None else frozenset(self.update)


async def count_the_rest(run: ChunkedRun, payload: InsertRows) -> None:
    """Give the rows that a failed import did not reach their verdict."""
    async with _bulk_write(run, payload) as writing:
        await writing.count_the_rest()


@chunked_job(count_the_rest, timeout_s=24 * 3600)
async def insert_rows(run: ChunkedRun, payload: InsertRows) -> Outcome:
    """Insert or update what the payload names, chunk by chunk in input order.

    A run after an interruption continues behind the last committed chunk. Every row gets a
    verdict, also when the job ends early.
    """
    async with _bulk_write(run, payload) as writing:
        await writing.write_all()
    return await run.report()


@asynccontextmanager
async def _bulk_write(run: ChunkedRun, payload: InsertRows) -> AsyncIterator[BulkWrite]:
    try:
        model = run.models.get(payload.table)
    except UnknownModel as error:
        raise Rejected(str(error)) from None
    async with open_input(run, payload.rows, payload.source, run.import_folders) as source:
        rules, request = payload.rules, payload.request
        writer = partial(Inserter, clashes=payload.clashes)
        yield await BulkWrite.begin(run, rules, request, model, source, writer)
