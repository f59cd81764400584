"""A job that enqueues itself, one time fewer."""

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from jobs._declaration import Outcome, Payload, job
from jobs._discovery import discover_jobs
from jobs._producer import Producer


class CarryOn(Payload):
    """`times` is how many more of its kind follow one another."""

    times: int


@job(timeout_s=30)
async def carry_on(session: AsyncSession, payload: CarryOn) -> Outcome:
    """Enqueue the next one in this transaction."""
    if payload.times:
        producer = Producer(async_sessionmaker(), discover_jobs([__name__]))
        await producer.enqueue(CarryOn(times=payload.times - 1), session=session)
    return {"left": payload.times}
