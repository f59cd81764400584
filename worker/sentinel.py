"""Where a Redis is whose master Sentinel names, and the connections that follow it."""

import re
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool
from redis.asyncio.sentinel import SentinelManagedConnection as Plain
from redis.asyncio.sentinel import SentinelManagedSSLConnection as Encrypted

SENTINEL_SCHEMES = ("redis+sentinel", "rediss+sentinel")
SENTINEL_URL_EXAMPLE = "redis+sentinel://:password@host1:26379,host2:26379/mymaster/0"
_PORT = 26379
_OBJECTS = re.compile(r"<redis\.\S+ - ")
"""What redis-py writes before the reason of each sentinel, which says where it is as well."""
_OF_SENTINELS = {"sentinel_username": "username", "sentinel_password": "password"}


class SentinelUrlError(ValueError):
    """What is wrong with the URL; never repeats it, since it may hold a password."""


class SentinelAddress(NamedTuple):
    """The sentinels, the master's name there, and a URL of the master with a host that is none."""

    sentinels: list[tuple[str, int]]
    master: str
    url: str


def parse_sentinel_url(url: str) -> SentinelAddress:
    """Take the URL apart. Raises SentinelUrlError."""
    try:
        parts = urlsplit(url)
        credentials, at, addresses = parts.netloc.rpartition("@")
        hosts = [urlsplit(f"//{address}") for address in addresses.split(",")]
        sentinels = [(host.hostname or "", host.port or _PORT) for host in hosts]
    except ValueError:
        raise SentinelUrlError("it is not a URL") from None
    if not all(name for name, _ in sentinels):
        raise SentinelUrlError("it names no sentinel")
    path = re.fullmatch(r"/([^/]+)(/\d*)?", parts.path)
    if path is None:
        raise SentinelUrlError("its path is not the name of a master and the number of a database")
    scheme, netloc = parts.scheme.partition("+")[0], f"{credentials}{at}master"
    master_url = parts._replace(scheme=scheme, netloc=netloc, path=path[2] or "").geturl()
    return SentinelAddress(sentinels, path[1], master_url)


class MasterPool(SentinelConnectionPool):
    """Connections to whichever server is the master when they are opened.

    Its connections to the sentinels end with it.
    """

    async def get_master_address(self) -> tuple[str, int]:
        try:
            address = await super().get_master_address()  # type: ignore[no-untyped-call]  # redis-py's
        except MasterNotFoundError as error:
            raise MasterNotFoundError(_OBJECTS.sub("", str(error))) from error
        return cast("tuple[str, int]", address)

    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        if inuse_connections:  # not when a new master is noticed, by asking one of these
            for sentinel in self.sentinel_manager.sentinels:
                await sentinel.connection_pool.disconnect()


def master_pool(url: str, **options: Any) -> MasterPool:
    """Connections that follow the master; options and those of the URL are those of a connection.

    The sentinels are asked by the same way as the master, with a login of their own.
    """
    address = parse_sentinel_url(url)
    options |= parse_url(address.url)
    login = {name: options.pop(option, None) for option, name in _OF_SENTINELS.items()}
    del options["host"]
    encrypted = options.pop("connection_class", None) is not None
    shared = {k: v for k, v in options.items() if k.startswith(("socket_", "ssl_"))}
    manager = Sentinel([])  # type: ignore[no-untyped-call]  # redis-py's
    manager.sentinels = [
        Redis(host=host, port=port, ssl=encrypted, **shared, **login)
        for host, port in address.sentinels
    ]
    kind = Encrypted if encrypted else Plain
    return MasterPool(  # type: ignore[no-untyped-call]  # redis-py's
        address.master, manager, connection_class=kind, check_connection=True, **options
    )
