"""Restore rows that were deleted softly, by key or by filter."""

from db.columns import OnParentDeleted
from db.overwriting import RESTORE
from jobs._declaration import Outcome, chunked_job
from jobs._run import ChunkedRun
from jobs._selection import Selection, changing


class RestoreRows(Selection):
    """Which rows are to be restored. One that lives stays unchanged.

    Of several deleted rows with one natural key the one that was deleted last is restored. What
    was deleted along with a row, by a relationship that cascades, comes back along with it;
    `references` says which do, where that is not to be as the model declares it.
    """

    references: dict[str, OnParentDeleted] = {}


async def count_the_rest(run: ChunkedRun, payload: RestoreRows) -> None:
    """Give the rows that a failed run did not reach their verdict."""
    async with changing(run, payload, RESTORE, references=payload.references) as writing:
        await writing.count_the_rest()


@chunked_job(count_the_rest, timeout_s=24 * 3600)
async def restore_rows(run: ChunkedRun, payload: RestoreRows) -> Outcome:
    """Restore the rows chunk by chunk; run again it goes on behind the last committed chunk."""
    async with changing(run, payload, RESTORE, references=payload.references) as writing:
        await writing.write_all()
    return await run.report()
