"""Rings that a worker is told of otherwise than through Redis, until its ear takes them."""

import asyncio
from collections.abc import Sequence

from arq.utils import timestamp_ms

from db.ledger.job import Ring
from jobs._bell import arq_id, ring_message
from worker.message import Message, Owner

MOST_LOW = 5000
"""How many of low priority may wait here: for a slot of theirs that may take hours."""


class Overheard:
    """Those that wait, in the order of their coming; each once, however often it is told."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, Message] = {}
        self._taken = asyncio.Event()

    async def add(self, rings: Sequence[Ring]) -> None:
        """Let these wait, and return when all have been taken but some of low priority."""
        now_ms = timestamp_ms()
        for one in rings:
            message = _message(one, now_ms)
            self._waiting.setdefault(message.arq_id, message)
        while self._is_crowded():
            self._taken.clear()
            await self._taken.wait()

    def _is_crowded(self) -> bool:
        waiting = self._waiting.values()
        return len(waiting) > MOST_LOW or not all(one.is_low for one in waiting)

    def pick(self, most: int, most_low: int) -> list[Message]:
        """Some of them, those of low priority last; they go on waiting."""
        picked: list[Message] = []
        for one in sorted(self._waiting.values(), key=lambda one: one.is_low):
            if len(picked) == most:
                break
            if not one.is_low or sum(other.is_low for other in picked) < most_low:
                picked.append(one)
        return picked

    def take(self, picked: Sequence[Message]) -> None:
        """Let what was picked wait no longer."""
        for one in picked:
            self._waiting.pop(one.arq_id, None)
        self._taken.set()


def _message(ring: Ring, now_ms: int) -> Message:
    return Message(
        ring.queue,
        arq_id(ring.job_id, ring.number).encode(),
        ring_message(ring.kind, now_ms),
        Owner.OURS,
        is_low=ring.priority < 0,
    )
