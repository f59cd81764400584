"""A job that puts itself off until its time has come, and then leaves a note."""

import time
from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncSession

from jobs import Payload, TryLater, job
from tests.sample_jobs.act_out import ADD_NOTE


class ComeBack(Payload):
    """`at` is in seconds since 1970."""

    note: str
    at: float


@job(timeout_s=60, max_age=timedelta(hours=1))
async def come_back(session: AsyncSession, payload: ComeBack) -> None:
    """Leave the note, which goes if it is too early."""
    await session.execute(ADD_NOTE, {"text": payload.note})
    if time.time() < payload.at:
        raise TryLater(timedelta(seconds=1), "it is too early")
