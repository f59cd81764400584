"""Change columns of rows that are there, by key or by filter."""

from pydantic import JsonValue, model_validator

from db.overwriting import OVERWRITE
from jobs._declaration import Outcome, chunked_job
from jobs._run import ChunkedRun
from jobs._selection import Selection, changing


class UpdateRows(Selection):
    """Which rows are to change, and to what.

    `values` are the same for all rows; what else an input gives beside the key is a patch of its
    row. Columns that are absent stay as they are, null sets them null. A row that gives
    `expect_version`, the name of a column, changes only on that version of its row.
    """

    values: dict[str, JsonValue] = {}

    @model_validator(mode="after")
    def _something_to_change(self) -> "UpdateRows":
        if (self.keys is not None or self.filter is not None) and not self.values:
            raise ValueError("keys and a filter need values to set")
        return self


async def count_the_rest(run: ChunkedRun, payload: UpdateRows) -> None:
    """Give the rows that a failed update did not reach their verdict."""
    async with changing(run, payload, OVERWRITE, payload.values) as writing:
        await writing.count_the_rest()


@chunked_job(count_the_rest, timeout_s=24 * 3600)
async def update_rows(run: ChunkedRun, payload: UpdateRows) -> Outcome:
    """Change the rows chunk by chunk; run again it goes on behind the last committed chunk."""
    async with changing(run, payload, OVERWRITE, payload.values) as writing:
        await writing.write_all()
    return await run.report()
