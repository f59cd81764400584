"""Rings that a worker is told of otherwise than through Redis, until its ear takes them."""

import asyncio
from collections.abc import Sequence

from arq.utils import timestamp_ms

from db.ledger.job import Ring
from jobs._bell import arq_id, ring_message
from worker.message import Message, Owner


class Overheard:
    """Those that wait, in the order of their coming."""

    def __init__(self) -> None:
        self._waiting: list[Message] = []
        self._none_waits = asyncio.Event()

    async def add(self, rings: Sequence[Ring]) -> None:
        """Let these wait, and return when all have been taken."""
        now_ms = timestamp_ms()
        self._none_waits.clear()
        self._waiting += [_message(one, now_ms) for one in rings]
        await self._none_waits.wait()

    def pick(self, most: int, most_low: int) -> list[Message]:
        """The first of them, at most so many, and so many of low priority; they go on waiting."""
        picked: list[Message] = []
        for one in self._waiting:
            if len(picked) == most:
                break
            if not one.is_low or sum(other.is_low for other in picked) < most_low:
                picked.append(one)
        return picked

    def take(self, picked: Sequence[Message]) -> None:
        """Let what was picked wait no longer."""
        self._waiting = [one for one in self._waiting if one not in picked]
        if not self._waiting:
            self._none_waits.set()


def _message(ring: Ring, now_ms: int) -> Message:
    return Message(
        ring.queue,
        arq_id(ring.job_id, ring.number).encode(),
        ring_message(ring.kind, now_ms),
        Owner.OURS,
        is_low=ring.priority < 0,
    )
