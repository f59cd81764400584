"""`bulwark retry`: run failed jobs once more."""

import asyncio
from typing import Annotated
from uuid import UUID

import typer
from typer import Argument

from db.ledger import dead_letter
from db.ledger.dead_letter import Choice
from db.ledger.job import State
from db.transaction import transaction
from worker.arguments import AsJson
from worker.command_group import quiet_settings
from worker.connection import Sessions, open_ledger
from worker.dead_letters import Asked, Kind, OfQueue, Since, WhyFailed
from worker.display import say, to_json
from worker.exit_codes import BadInput
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
    if job_id is not None:
        ids = asyncio.run(_retry_one(settings, job_id))
    else:
        ids = asyncio.run(_retry_all(settings, asked.choice))
    _tell(ids, as_json=as_json)


def _tell(ids: list[UUID], *, as_json: bool) -> None:
    if as_json:
        for one in ids:
            typer.echo(to_json({"job_id": one, "state": State.QUEUED}))
    elif len(ids) == 1:
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


async def _retry_all(settings: Settings, choice: Choice) -> list[UUID]:
    """Those that have failed by now, a batch at a time; one that fails again is left alone."""
    async with open_ledger(settings) as sessions:
        async with sessions() as session:
            failed = await dead_letter.choose_failed(session, choice)
        return [
            job_id
            for at in range(0, len(failed), BATCH)
            for job_id in await _retry(sessions, failed[at : at + BATCH])
        ]


async def _retry(sessions: Sessions, job_ids: list[UUID]) -> list[UUID]:
    return await transaction(
        sessions, lambda session: dead_letter.retry(session, job_ids), name="job.retry"
    )
