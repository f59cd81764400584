"""What becomes of a message: a ring runs its job, anything else becomes a job or is parked."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar
from uuid import UUID

import sqlalchemy as sa
import structlog
from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger import parked
from db.ledger.job import RING_AGAIN, job
from db.retry import DATABASE_ERRORS, describe
from db.transaction import brief, look
from jobs._adoption import adopt_message, printable
from jobs._bell import job_id_of, kind_of
from jobs._errors import Unadoptable
from worker.ear import Ear
from worker.executor import Executor
from worker.message import Message, Owner

T = TypeVar("T")
log = structlog.get_logger("bulwark.delivery")


@dataclass(frozen=True)
class Delivery:
    """Carries messages to the executor."""

    executor: Executor
    ear: Ear

    async def carry_out(self, message: Message) -> None:
        """Run the job that was rung; a message of somebody else is made a job first.

        A job of a kind that this worker does not know is left to the relay, which rings again.
        """
        is_ring = message.is_ring and _can_be_read(message)
        job_id = self._heard(message) if is_ring else await self._take_in(message)
        if job_id is not None:
            kind = kind_of(message.content) if is_ring else None
            await self.executor.deliver(job_id, kind)

    def _heard(self, ring: Message) -> UUID | None:
        kind, arq_id = kind_of(ring.content), ring.arq_id.decode()
        if kind not in self.executor.jobs:
            log.warning("job.unknown", arq_id=arq_id, kind=kind, remedy="it is rung again")
            return None
        return job_id_of(arq_id)

    async def _take_in(self, message: Message) -> UUID | None:
        """Make the message a job and return its id; None when there is nothing to run here.

        It leaves Redis only after that is committed. While PostgreSQL is away it stays there, and
        is heard again after a while. A job of low priority has to wait for a slot that such jobs
        may have: it is rung.
        """
        arq_id = printable(message.arq_id)
        try:
            job_id = await self._adopt_or_park(message, arq_id)
            priority = None if job_id is None else await self._priority(job_id)
        except DATABASE_ERRORS as error:
            log.warning("message.not_adopted", arq_id=arq_id, reason=describe(error))
            return None
        await self._remove(message, arq_id)
        if job_id is not None and priority is not None and priority < 0:
            self.executor.unclaimed.add(job_id)
            return None
        return job_id

    async def _adopt_or_park(self, message: Message, arq_id: str) -> UUID | None:
        is_ring = message.owner is Owner.LIKE_OURS and _can_be_read(message)
        if is_ring and await self._priority(job_id_of(arq_id)) is not None:
            return self._heard(message)
        try:
            job_id = await self._do(
                lambda session: adopt_message(
                    session, self.executor.jobs, message.queue, arq_id, message.content, RING_AGAIN
                )
            )
        except Unadoptable as error:
            await self._park(message, arq_id, error)
            return None
        log.info("message.adopted", job=str(job_id), arq_id=arq_id, queue=message.queue)
        return job_id

    async def _priority(self, job_id: UUID) -> int | None:
        """None where there is no such job."""
        query = sa.select(job.c.priority).where(job.c.id == job_id)
        return await look(self.executor.sessions, lambda session: session.scalar(query))

    async def _park(self, message: Message, arq_id: str, why: Unadoptable) -> None:
        kind = None if why.kind is None else printable(why.kind.encode(errors="backslashreplace"))
        is_new = await self._do(
            lambda session: parked.park(
                session, message.queue, arq_id, message.content, why.reason, kind
            )
        )
        if is_new:
            log.warning(
                "message.parked",
                arq_id=arq_id,
                queue=message.queue,
                kind=kind,
                reason=why.reason,
                remedy="see `bulwark parked`",
            )

    async def _do(self, work: Callable[[AsyncSession], Awaitable[T]]) -> T:
        return await brief(self.executor.sessions, work, name="message.adopt")

    async def _remove(self, message: Message, arq_id: str) -> None:
        try:
            await self.ear.remove(message)
        except RedisError as error:
            log.warning("message.not_removed", arq_id=arq_id, reason=str(error))


def _can_be_read(ring: Message) -> bool:
    """Whether it is JSON, which the pattern in Redis that a ring has to fit does not promise."""
    try:
        kind_of(ring.content)
    except ValueError:
        return False
    return True
