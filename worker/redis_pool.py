"""The Redis client of Bulwark's processes, and what it demands of the server."""

from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs, urlsplit

from arq.connections import ArqRedis
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from db.errors import BulwarkError
from jobs._bell import EXPIRES_MS, deserialize, serialize
from worker.sentinel import SENTINEL_SCHEMES, master_pool


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
    command around those of its connection. Behind Sentinel each connection leads to the server
    that is the master when it is opened, and ends when that one is the master no more.
    """
    options = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
        "retry_on_error": [RedisConnectionError],
        "health_check_interval": 30,
        **_host_checking(url),
    }
    scheme = urlsplit(url).scheme
    open_pool = master_pool if scheme in SENTINEL_SCHEMES else ConnectionPool.from_url
    redis = ArqRedis(open_pool(url, **options))
    redis.auto_close_connection_pool = True
    redis.job_serializer = serialize
    redis.job_deserializer = deserialize
    redis.expires_extra_ms = EXPIRES_MS
    return redis


async def close_redis(redis: Redis) -> None:
    """Let go of its connections, also where nobody says goodbye at the other end, as TLS asks."""
    with suppress(RedisError, OSError):
        await redis.aclose(close_connection_pool=True)


def _host_checking(url: str) -> dict[str, bool]:
    """With TLS the certificate must be that of the host, unless the URL asks for no certificate.

    redis-py by itself takes the certificate of any host.
    """
    parts = urlsplit(url)
    if not parts.scheme.startswith("rediss"):
        return {}
    return {"ssl_check_hostname": parse_qs(parts.query).get("ssl_cert_reqs") != ["none"]}


async def may_evict(redis: Redis) -> bool:
    """Whether the server throws keys away when its memory is full."""
    memory = await redis.info("memory")
    return bool(memory["maxmemory"]) and memory["maxmemory_policy"] != "noeviction"


async def run_id_of(redis: Redis) -> str:
    """What tells one run of the server from the next; empty where the server does not say."""
    return str((await redis.info("server")).get("run_id", ""))


async def require_lasting(redis: Redis) -> None:
    """Raise EvictingRedis on a server that may evict."""
    if await may_evict(redis):
        raise EvictingRedis
