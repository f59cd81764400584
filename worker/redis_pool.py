"""The Redis client of Bulwark's processes, and what it demands of the server."""

from typing import Any

from arq.connections import ArqRedis
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

from db.errors import BulwarkError
from jobs._bell import EXPIRES_MS, deserialize, serialize


class EvictingRedis(BulwarkError):
    """Redis may throw keys away, and rings with them; set maxmemory-policy to noeviction."""


class Doorkeeper(ArqRedis):
    """The client of arq's own worker, which only hands over to ours.

    When it ends it deletes a key that it never wrote; Redis may be away by then.
    """

    async def delete(self, *names: Any) -> int:
        return 0


def make_redis(url: str, timeout_s: float) -> ArqRedis:
    """A client that never waits for ever; opens nothing yet.

    A connection that is lost is replaced once, at once, which is enough after a restart. Whoever
    can wait for Redis does so in a loop of its own: redis-py would nest its retries, those of a
    command around those of its connection.
    """
    redis: ArqRedis = ArqRedis.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
        retry_on_error=[RedisConnectionError],
        health_check_interval=30,
    )
    redis.job_serializer = serialize
    redis.job_deserializer = deserialize
    redis.expires_extra_ms = EXPIRES_MS
    return redis


async def may_evict(redis: Redis) -> bool:
    """Whether the server throws keys away when its memory is full."""
    memory = await redis.info("memory")
    return bool(memory["maxmemory"]) and memory["maxmemory_policy"] != "noeviction"


async def require_lasting(redis: Redis) -> None:
    """Raise EvictingRedis on a server that may evict."""
    if await may_evict(redis):
        raise EvictingRedis
