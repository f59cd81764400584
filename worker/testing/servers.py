"""PostgreSQL and Redis for a test run, from one of three sources."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode, urlsplit

import redis

from db.engine import PoolProfile, create_engine
from db.retry import DATABASE_ERRORS, describe
from worker.settings import TEST_PREFIX
from worker.testing.beside import Beside
from worker.testing.choice import ServerChoice, Source
from worker.testing.errors import ServersUnfit

USUAL_REDIS_DATABASES = 16


class RedisDatabases:
    """The logical databases of a Redis that tests may empty; they are few, and come round again."""

    def __init__(self, url: str, numbers: Iterable[int]) -> None:
        self._url = urlsplit(url)
        self._free = deque(numbers)

    def next(self) -> str:
        """The URL of an empty one, until all others have been given."""
        number = self._free[0]
        self._free.rotate(-1)
        return self._emptied(number)

    @contextmanager
    def kept(self) -> Iterator[str]:
        """The URL of an empty one that nobody else gets while the block lasts."""
        number = self._free.popleft()
        try:
            yield self._emptied(number)
        finally:
            self._free.append(number)

    def url(self, number: int) -> str:
        """The URL of the database of this number, whatever is in it."""
        options = [(name, value) for name, value in parse_qsl(self._url.query) if name != "db"]
        if self._url.scheme == "unix":
            return f"unix://{self._url.path}?{urlencode([*options, ('db', number)])}"
        return self._url._replace(path=f"/{number}", query=urlencode(options)).geturl()

    def _emptied(self, number: int) -> str:
        url = self.url(number)
        with redis.Redis.from_url(url) as client:
            client.flushdb()
        return url


@dataclass(frozen=True)
class Servers:
    """Two servers for tests; databases may be made at the first address, with full rights."""

    database_url: str
    redis: RedisDatabases


@contextmanager
def open_servers(choice: ServerChoice) -> Iterator[Servers]:
    """Servers for the time of the block; what was started for it is gone afterwards.

    Raises EmbeddedServerError or ContainerError when they cannot be started, and ServersUnfit.
    """
    if choice.servers is Source.EMBEDDED:
        from worker.embedded import EmbeddedValkey, embedded_servers

        with embedded_servers(durable=False, in_memory=True) as running:
            numbers = range(EmbeddedValkey.databases)
            yield Servers(running.database_url, RedisDatabases(running.redis_url, numbers))
    elif choice.servers is Source.CONTAINERS:
        from worker.testing.containers import REDIS_DATABASES, container_postgres, container_redis

        with (
            container_postgres(choice, in_memory=True) as postgres,
            container_redis(choice) as server,
        ):
            yield Servers(postgres.url, RedisDatabases(server.url, range(REDIS_DATABASES)))
    else:
        yield _given(choice)


def _given(choice: ServerChoice) -> Servers:
    """The servers of somebody else, of whose Redis each process of pytest-xdist takes its part."""
    assert choice.database_url is not None
    assert choice.redis_url is not None
    _require_answer(choice.database_url.get_secret_value())
    url = choice.redis_url.get_secret_value()
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    numbers = range(process, _count_databases(url), processes)
    if not numbers:
        raise ServersUnfit(
            f"The Redis of {TEST_PREFIX}REDIS_URL has fewer databases than the {processes} "
            "processes of pytest-xdist: start fewer."
        )
    return Servers(choice.database_url.get_secret_value(), RedisDatabases(url, numbers))


def _require_answer(database_url: str) -> None:
    """Raise ServersUnfit unless PostgreSQL lets this user in."""
    try:
        with closing(Beside()) as beside:
            beside.run(_connect(database_url))
    except DATABASE_ERRORS as error:
        raise ServersUnfit(f"{TEST_PREFIX}DATABASE_URL: {describe(error)}.") from None


async def _connect(database_url: str) -> None:
    engine = create_engine(database_url, profile=PoolProfile.LIGHT, application_name="tests")
    async with engine.connect():
        pass
    await engine.dispose()


def _count_databases(url: str) -> int:
    with redis.Redis.from_url(url) as client:
        try:
            return int(client.config_get("databases")["databases"])
        except redis.ResponseError:  # hosted servers often forbid CONFIG
            return USUAL_REDIS_DATABASES
        except redis.RedisError as error:
            raise ServersUnfit(
                f"The Redis of {TEST_PREFIX}REDIS_URL cannot be reached: {error}."
            ) from None
