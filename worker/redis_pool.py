"""The Redis client of Bulwark's processes, and what it demands of the server."""

from arq.connections import ArqRedis
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from db.errors import BulwarkError
from jobs._bell import EXPIRES_MS, deserialize, serialize


class EvictingRedis(BulwarkError):
    """Redis may throw keys away, and rings with them; set maxmemory-policy to noeviction."""


def make_redis(url: str, timeout_s: float) -> ArqRedis:
    """A client that does not wait for ever and tries a lost connection again; opens nothing yet."""
    redis: ArqRedis = ArqRedis.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(ExponentialBackoff(cap=1.0, base=0.05), 5),
        retry_on_error=[RedisConnectionError, RedisTimeoutError, OSError],
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
