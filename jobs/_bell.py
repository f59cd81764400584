"""Ringing: telling arq in Redis that a job is due. Redis carries ids, never the job itself."""

import json
import re
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from arq.constants import (
    default_queue_name,
    in_progress_key_prefix,
    job_key_prefix,
    retry_key_prefix,
)
from arq.jobs import serialize_job
from arq.utils import timestamp_ms
from redis.asyncio import Redis

from db.ledger.job import PRIORITY_LIMIT, Ring
from jobs._declaration import DEFAULT_QUEUE

VERSION = b"\x01"
EXPIRES_MS = 10 * 365 * 24 * 3600 * 1000
PRIORITY_STEP_MS = 10_000_000_000
"""How much earlier one step of priority makes a ring: longer than any job waits (115 days)."""
WAKE_EXPIRES_MS = 60_000


def serialize(message: dict[str, Any]) -> bytes:
    """An arq message as JSON behind a version byte; never pickle."""
    return VERSION + json.dumps(message, separators=(",", ":")).encode()


def deserialize(message: bytes) -> dict[str, Any]:
    """Read a message of this version. Raises ValueError on any other."""
    if message[:1] != VERSION:
        raise ValueError("the message is not JSON behind the version byte 1")
    content = json.loads(message[1:])
    if not isinstance(content, dict):
        raise ValueError("the message is not a JSON object")
    return content


def queue_key(queue: str) -> str:
    """The sorted set in Redis that arq reads for a queue."""
    return default_queue_name if queue == DEFAULT_QUEUE else f"{default_queue_name}:{queue}"


def wake_key(queue: str) -> str:
    """The list on which workers wait that have nothing to do: what is in it says "look"."""
    return f"bulwark:wake:{queue}"


def arq_id(job_id: UUID, number: int) -> str:
    """The arq id of one ring: arq refuses an id whose old key still exists, so none is reused."""
    return f"{job_id}:{number}"


def job_id_of(arq_job_id: str) -> UUID:
    """The job that a ring is for."""
    return UUID(arq_job_id.partition(":")[0])


def kind_of(message: bytes | None) -> str | None:
    """The kind of job that a ring is for; None when its message has disappeared."""
    return None if message is None else deserialize(message)["f"]


def ring_message(kind: str, now_ms: int) -> bytes:
    """What a ring says."""
    return serialize_job(kind, (), {}, None, now_ms, serializer=serialize)


class Bell:
    """Rings jobs through one Redis connection pool."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def ring(self, rings: Sequence[Ring]) -> None:
        """Put jobs into their arq queues, each in place of its ring before, and wake the workers.

        Everything goes in one round trip. Ringing twice, or a job that is gone, does no harm.
        Raises redis.exceptions.RedisError when Redis does not take it; the relay will ring again.
        """
        if not rings:
            return
        now_ms = timestamp_ms()
        async with self._redis.pipeline(transaction=True) as pipe:
            for ring in sorted(rings, key=lambda one: one.job_id):
                queue = queue_key(ring.queue)
                if ring.number > 1:
                    _silence(pipe, queue, arq_id(ring.job_id, ring.number - 1))
                name = arq_id(ring.job_id, ring.number)
                message = ring_message(ring.kind, now_ms)
                pipe.psetex(job_key_prefix + name, EXPIRES_MS, message)
                pipe.zadd(queue, {name: score_ms(now_ms, ring.priority)})
            for queue in sorted({ring.queue for ring in rings}):
                _wake(pipe, queue)
            await pipe.execute()

    async def oldest(self, queue: str, most: int = 200) -> list[str]:
        """The arq ids of our rings that stand first in a queue."""
        names = await self._redis.zrange(queue_key(queue), 0, most - 1)
        return [name.decode() for name in names if _OURS.fullmatch(name)]

    async def missing(self, rings: Sequence[Ring]) -> list[Ring]:
        """Those of the rings that Redis has no more: they were heard, or lost."""
        if not rings:
            return []
        async with self._redis.pipeline(transaction=False) as pipe:
            for ring in rings:
                pipe.exists(job_key_prefix + arq_id(ring.job_id, ring.number))
            there = await pipe.execute()
        return [ring for ring, is_there in zip(rings, there, strict=True) if not is_there]

    async def silence(self, queue: str, names: Sequence[str]) -> None:
        """Take rings back; a job that is just being delivered is not disturbed by it."""
        if names:
            async with self._redis.pipeline(transaction=True) as pipe:
                _silence(pipe, queue_key(queue), *names)
                await pipe.execute()


_OURS = re.compile(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}:[0-9]+")
_KEYS = (job_key_prefix, in_progress_key_prefix, retry_key_prefix)


def _wake(pipe: Any, queue: str) -> None:
    """One token is enough: a worker that leaves something behind wakes the next."""
    pipe.lpush(wake_key(queue), b"")
    pipe.ltrim(wake_key(queue), 0, 0)
    pipe.pexpire(wake_key(queue), WAKE_EXPIRES_MS)


def _silence(pipe: Any, queue: str, *names: str) -> None:
    pipe.zrem(queue, *names)
    pipe.delete(*(prefix + name for prefix in _KEYS for name in names))


def score_ms(now_ms: int, priority: int) -> int:
    """arq takes the lowest score first, and none that lies in the future by the worker's clock.

    Even the lowest priority lies a step in the past, so that clocks may differ.
    """
    return now_ms - (priority + PRIORITY_LIMIT + 1) * PRIORITY_STEP_MS
