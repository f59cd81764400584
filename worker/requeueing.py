"""A parked message is made a job after all, once what was in the way is gone."""

from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger import parked
from db.transaction import transaction
from jobs._adoption import adopt_message
from jobs._discovery import discover_jobs
from jobs._errors import Unadoptable
from jobs._producer import Enqueued
from worker.connection import open_ledger
from worker.exit_codes import BadInput
from worker.settings import Settings


async def requeue_parked(settings: Settings, number: int) -> Enqueued:
    """Make the parked message a job, which a relay rings; the message stays, with the job's id.

    Raises BadInput when there is no such message, or still no job can be made of it.
    """
    jobs = discover_jobs(settings.job_modules)

    async def work(session: AsyncSession) -> Enqueued:
        message = await parked.take_parked(session, number)
        if message is None:
            raise BadInput(f"There is no parked message {number}: see `bulwark parked`.")
        job_id = await adopt_message(session, jobs, *message, ring_after=timedelta(0))
        await parked.settle(session, number, job_id)
        return Enqueued(job_id, created=True)

    async with open_ledger(settings) as sessions:
        try:
            return await transaction(sessions, work, name="message.requeue")
        except Unadoptable as error:
            raise BadInput(f"Message {number} stays parked: {error}.") from None
