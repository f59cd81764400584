"""A job that leaves a note every second, by its schedule."""

from sqlalchemy.ext.asyncio import AsyncSession

from jobs import Payload, Schedule, job
from tests.sample_jobs.act_out import ADD_NOTE


class KeepWatch(Payload):
    """What to note."""

    note: str = "all is well"


@job(
    timeout_s=60,
    schedules=[
        Schedule(name="watch", cron="* * * * * *", missed="all", overlap="queue"),
        Schedule(name="night_watch", cron="0 3 * * *", timezone="Europe/Berlin", enabled=False),
        Schedule(name="vigil", cron="0 4 * * *", off_until="redis_url"),
    ],
)
async def keep_watch(session: AsyncSession, payload: KeepWatch) -> None:
    """Leave the note."""
    await session.execute(ADD_NOTE, {"text": payload.note})
