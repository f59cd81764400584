"""`bulwark retry`: run failed jobs once more."""

import asyncio
from collections.abc import Callable
from typing import Annotated
from uuid import UUID

import typer
from typer import Argument

from db.ledger import dead_letter
from db.ledger.dead_letter import Choice
from db.ledger.job import State
from db.retry import DATABASE_ERRORS
from db.transaction import transaction
from worker.arguments import AsJson
from worker.command_group import quiet_settings
from worker.connection import Sessions, open_ledger
from worker.dead_letters import Asked, Kind, OfQueue, Since, WhyFailed
from worker.display import say, to_json
from worker.exit_codes import BadInput, PartlyDone
from worker.reports import find_job, read_job
from worker.settings import Settings

BATCH = 500
OneJob = Annotated[
    str | None,
    Argument(metavar="[ID]", help="The job's id, or 8 or more of its first or last signs."),
]


def add_to(app: typer.Typer) -> None:
    app.command()(retry)


def retry(
    job_id: OneJob = None,
    kind: Kind = None,
    reason: WhyFailed = None,
    queue: OfQueue = None,
    since: Since = None,
    as_json: AsJson = False,
) -> None:
    """Run failed jobs again, each behind what it has committed; a cancelled one by its id."""
    asked = Asked(kind=kind, reason=reason, queue=queue, since=since)
    chosen = any(vars(asked).values())
    if (job_id is None) != chosen:
        raise BadInput("Say which: the id of one job, or --kind, --reason, --queue, --since.")
    settings = quiet_settings()
    note = _print_json if as_json else _print_nothing
    if job_id is not None:
        ids = asyncio.run(_retry_one(settings, job_id))
        note(ids)
    else:
        ids = asyncio.run(_retry_all(settings, asked.choice, note))
    if not as_json:
        _tell(ids)


def _print_json(ids: list[UUID]) -> None:
    for one in ids:
        typer.echo(to_json({"job_id": one, "state": State.QUEUED}))


def _print_nothing(_: list[UUID]) -> None:
    """The number alone is told, at the end."""


def _tell(ids: list[UUID]) -> None:
    if len(ids) == 1:
        say(f"Job {ids[0]} is queued again.")
        say(f"See how it goes: bulwark job {ids[0]} --follow")
    else:
        say(f"{len(ids):,} jobs are queued again." if ids else "No failed job is like that.")


async def _retry_one(settings: Settings, text: str) -> list[UUID]:
    async with open_ledger(settings) as sessions:
        async with sessions() as session:
            job_id = await find_job(session, text)
            state = (await read_job(session, job_id, settings.lost_after_s)).state
        if state not in (State.FAILED, State.CANCELLED):
            raise BadInput(
                f"Job {job_id} has the state {state}; only one that failed or was cancelled can be "
                "retried."
            )
        return await _retry(sessions, [job_id])


async def _retry_all(
    settings: Settings, choice: Choice, note: Callable[[list[UUID]], None]
) -> list[UUID]:
    """Those that have failed by now, a batch at a time; one that fails again is left alone.

    `note` is given each batch that is committed. Raises PartlyDone when one is not.
    """
    async with open_ledger(settings) as sessions:
        async with sessions() as session:
            failed = await dead_letter.choose_failed(session, choice)
        queued: list[UUID] = []
        for at in range(0, len(failed), BATCH):
            try:
                batch = await _retry(sessions, failed[at : at + BATCH])
            except DATABASE_ERRORS as error:
                if not queued:
                    raise
                raise PartlyDone(
                    f"{len(queued):,} of {len(failed):,} failed jobs are queued again, and the "
                    "same command goes on with the others",
                    error,
                ) from None
            note(batch)
            queued += batch
        return queued


async def _retry(sessions: Sessions, job_ids: list[UUID]) -> list[UUID]:
    return await transaction(
        sessions, lambda session: dead_letter.retry(session, job_ids), name="job.retry"
    )
