"""The job of pickup: it tells when its first line ran."""

import time

from sqlalchemy.ext.asyncio import AsyncSession

from jobs import Outcome, Payload, job


class MarkStart(Payload):
    """Nothing to say."""


@job(timeout_s=60)
async def mark_start(session: AsyncSession, payload: MarkStart) -> Outcome:
    """Return the instant on the monotonic clock, which all processes of a machine share."""
    return {"started_ns": time.monotonic_ns()}
