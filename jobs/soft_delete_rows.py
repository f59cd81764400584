"""Delete rows softly, by key or by filter: they stay, and are no longer seen."""

from db.columns import OnParentDeleted
from db.overwriting import DELETE
from jobs._declaration import Outcome, chunked_job
from jobs._run import ChunkedRun
from jobs._selection import Selection, changing


class SoftDeleteRows(Selection):
    """Which rows are to be deleted. One that is deleted already stays unchanged.

    `references` says of relationships, such as hero.team_id, what becomes of the rows that refer
    so to a row that goes, where that is not to be as the model declares it: refuse to delete the
    row that they refer to, cascade, or leave them as they are.
    """

    references: dict[str, OnParentDeleted] = {}


async def count_the_rest(run: ChunkedRun, payload: SoftDeleteRows) -> None:
    """Give the rows that a failed run did not reach their verdict."""
    async with changing(run, payload, DELETE, references=payload.references) as writing:
        await writing.count_the_rest()


@chunked_job(count_the_rest, timeout_s=24 * 3600)
async def soft_delete_rows(run: ChunkedRun, payload: SoftDeleteRows) -> Outcome:
    """Delete the rows chunk by chunk; run again it goes on behind the last committed chunk."""
    async with changing(run, payload, DELETE, references=payload.references) as writing:
        await writing.write_all()
    return await run.report()
