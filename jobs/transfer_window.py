"""Carry out an ordered file of transfers: each a verdict of its own, or all of them together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated

from pydantic import Field, JsonValue, model_validator

from jobs._bulk_write import BulkWrite
from jobs._declaration import Outcome, chunked_job
from jobs._input import InPlace, Spooled, open_input
from jobs._mapped import MappedInput
from jobs._mover import Mover
from jobs._rules import Rules
from jobs._run import ChunkedRun

CHUNK_ROWS = 2_000
MOST_CHUNK_ROWS = 100_000
MOST_CHUNK_BYTES = 8 * 1024 * 1024


class TransferWindow(MappedInput):
    """The transfers, each with the fields of TransferCreate: hero_id, from_team_id, to_team_id.

    No value in `from_team_id` is a free agent, none in `to_team_id` a release. `from_anywhere` is
    for an input that does not say which teams are left. `map`, `constants`, `where`, `ignore` and
    `ignore_unknown` say what the columns mean, `expect_version` in which of them stands the version
    that a hero has to have.
    A transfer that is refused stands in the way of no other, unless they are `atomic`: then all
    take effect in one transaction, or, at one reject more than `max_rejects`, none. At more rows
    than `max_rows` nothing happens. A `dry_run` tells what would become of each, by carrying them
    out in one transaction that is rolled back.
    """

    rows: list[dict[str, JsonValue]] | None = None
    source: Annotated[InPlace | Spooled, Field(discriminator="type")] | None = None
    from_anywhere: bool = False
    atomic: bool = False
    max_rejects: Annotated[int, Field(ge=0)] | None = None
    max_rows: Annotated[int, Field(ge=0)] | None = None
    dry_run: bool = False
    chunk_rows: Annotated[int, Field(ge=1, le=MOST_CHUNK_ROWS)] | None = None
    chunk_bytes: Annotated[int, Field(ge=1024, le=MOST_CHUNK_BYTES)] = MOST_CHUNK_BYTES

    @model_validator(mode="after")
    def _one_input(self) -> "TransferWindow":
        if (self.rows is None) == (self.source is None):
            raise ValueError("give either rows or a source")
        return self

    @property
    def rules(self) -> Rules:
        """How the transfers are to be carried out.

        Together they are one chunk if they can be, so that locks are taken once and in one order.
        """
        together = self.atomic or self.dry_run
        usual_rows = MOST_CHUNK_ROWS if together else CHUNK_ROWS
        most = 0 if self.atomic and self.max_rejects is None else self.max_rejects
        return Rules(
            usual_rows if self.chunk_rows is None else self.chunk_rows,
            self.chunk_bytes,
            most,
            self.max_rows,
            atomic=self.atomic,
            dry_run=self.dry_run,
        )


async def count_the_rest(run: ChunkedRun, payload: TransferWindow) -> None:
    """Give the transfers that a failed window did not reach their verdict."""
    async with _bulk_write(run, payload) as writing:
        await writing.count_the_rest()


@chunked_job(count_the_rest, timeout_s=24 * 3600)
async def transfer_window(run: ChunkedRun, payload: TransferWindow) -> Outcome:
    """Carry out the transfers in their order; run again it goes on behind the last chunk."""
    async with _bulk_write(run, payload) as writing:
        await writing.write_all()
    return await run.report()


@asynccontextmanager
async def _bulk_write(run: ChunkedRun, payload: TransferWindow) -> AsyncIterator[BulkWrite]:
    model = run.models.get("transfer")
    writer = partial(Mover, from_anywhere=payload.from_anywhere)
    async with open_input(run, payload.rows, payload.source, run.import_folders) as source:
        yield await BulkWrite.begin(run, payload.rules, payload.request, model, source, writer)
