"""Servers that a test may stop, freeze and start, from the same source as all others."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import psutil
import pytest

from worker.embedded import EmbeddedPostgres, embedded_postgres, embedded_valkey
from worker.embedded.postgres import StopMode
from worker.testing.choice import Source, choose_servers
from worker.testing.containers import ContainerPostgres, container_postgres, container_redis


class OwnPostgres(Protocol):
    """A PostgreSQL at an address that outlives restarts."""

    @property
    def url(self) -> str: ...

    def stop(self, mode: StopMode = "fast") -> None: ...

    def start(self) -> None: ...


class OwnRedis(Protocol):
    """A Redis, or a Valkey, which forgets everything when it ends."""

    @property
    def url(self) -> str: ...

    def stop(self) -> None: ...

    def kill(self) -> None: ...

    def start(self) -> None: ...


def own_postgres(*, durable: bool = False) -> AbstractContextManager[OwnPostgres]:
    """For the time of the block; one that is not durable may lose commits in a crash."""
    choice = choose_servers()
    if choice.servers is Source.CONTAINERS:
        return container_postgres(choice, durable=durable)
    _require_started_here(choice.servers)
    return embedded_postgres(durable=durable)


def own_redis() -> AbstractContextManager[OwnRedis]:
    """For the time of the block."""
    choice = choose_servers()
    if choice.servers is Source.CONTAINERS:
        return container_redis(choice)
    _require_started_here(choice.servers)
    return embedded_valkey()


@contextmanager
def frozen(postgres: OwnPostgres) -> Iterator[None]:
    """Let the server accept connections and answer nothing while the block lasts."""
    if isinstance(postgres, ContainerPostgres):
        postgres.freeze()
        try:
            yield
        finally:
            postgres.thaw()
        return
    assert isinstance(postgres, EmbeddedPostgres)
    server = psutil.Process(postgres.pid)
    server.suspend()  # before its children are counted, of which it makes more
    children = server.children(recursive=True)
    for one in children:
        one.suspend()
    try:
        yield
    finally:
        for one in [server, *children]:
            one.resume()


def _require_started_here(source: Source) -> None:
    if source is Source.URL:
        pytest.skip("stops a server, and those of BULWARK_TEST_SERVERS=url belong to somebody else")
