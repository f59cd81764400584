"""PostgreSQL and Redis in containers, which can be stopped and started at the same address."""

import gc
import secrets
import signal
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any, NoReturn, Self, cast

import asyncpg
import docker
import redis
from docker.errors import DockerException
from requests.exceptions import RequestException
from tenacity import RetryError, Retrying, retry_if_exception_type, stop_after_delay, wait_fixed
from testcontainers.community.postgres import PostgresContainer
from testcontainers.core.container import DockerContainer

from worker.embedded import EmbeddedValkey, free_port
from worker.embedded.postgres import FORGETFUL_SETTINGS, SETTINGS, STOP_SIGNALS, StopMode
from worker.testing.beside import Beside
from worker.testing.choice import ServerChoice
from worker.testing.errors import ContainerError

REDIS_DATABASES = EmbeddedValkey.databases
_REDIS_SERVER = (
    'exec "$(command -v valkey-server || command -v redis-server)" --bind 0.0.0.0 '
    f"--protected-mode no --databases {REDIS_DATABASES} "
    "--save '' --appendonly no --maxmemory-policy noeviction"
)
_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 30
_POLL_S = 0.05
_LOG_LINES = 10
_LOOPBACK = ("localhost", "127.0.0.1")


def require_engine() -> None:
    """Raise ContainerError unless a Docker engine answers."""
    if fault := _engine_fault():
        raise ContainerError(
            f"No Docker engine answers ({fault}): start one, or say where it is in DOCKER_HOST"
        )


def _engine_fault() -> str | None:
    try:
        with closing(docker.from_env()) as client:
            client.ping()
        return None
    except (DockerException, RequestException) as error:
        fault = str(error)
    with warnings.catch_warnings():
        # docker-py leaves a socket open that could not connect: it is collected here, lest it be
        # found, and reported, in whatever test comes next.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    return fault


@contextmanager
def container_postgres(
    choice: ServerChoice, *, durable: bool = False, in_memory: bool = False
) -> Iterator["ContainerPostgres"]:
    """Run a PostgreSQL while the block lasts.

    Not durable is faster, and loses what was committed last when it does not stop in order. In
    memory is faster still, and loses everything when it is stopped.
    """
    image = choice.postgres_image
    with ContainerPostgres(image, durable=durable, in_memory=in_memory) as postgres:
        yield postgres


@contextmanager
def container_redis(choice: ServerChoice) -> Iterator["ContainerRedis"]:
    """Run a Redis that keeps nothing when it ends while the block lasts."""
    with ContainerRedis(choice.redis_image) as server:
        yield server


class _Server(ABC):
    """One container, on a port that stays the same when it is stopped and started."""

    def __init__(self, container: DockerContainer, port: int) -> None:
        self._container = container
        host = container.get_docker_client().host()
        self._host = "127.0.0.1" if host in _LOOPBACK else host
        self._port = free_port()
        interface = "127.0.0.1" if host in _LOOPBACK else "0.0.0.0"  # noqa: S104 - a remote engine
        ports = cast("dict[str, Any]", container.ports)  # docker-py takes more than is declared
        ports.clear()
        ports[f"{port}/tcp"] = (interface, self._port)

    def __enter__(self) -> Self:
        with ExitStack() as unless_it_answers:
            unless_it_answers.callback(self._container.stop)
            try:
                self._container.start()
            except (DockerException, RequestException) as error:
                image = self._container.image
                raise ContainerError(f"The image {image} does not start: {error}") from None
            self._wait_until_ready()
            unless_it_answers.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._container.stop()

    def start(self) -> None:
        """Start it again, with the data that it has kept; return when it answers."""
        self._container.get_wrapped_container().start()
        self._wait_until_ready()

    @abstractmethod
    def stop(self) -> None:
        """Stop in order."""

    def freeze(self) -> None:
        """Let it accept connections, and answer nothing until `thaw`."""
        self._container.get_wrapped_container().pause()

    def thaw(self) -> None:
        self._container.get_wrapped_container().unpause()

    def _end(self, number: signal.Signals) -> None:
        """Send the signal and wait for the end."""
        wrapped = self._container.get_wrapped_container()
        wrapped.kill(signal=number.value)
        wrapped.wait(timeout=_STOP_TIMEOUT_S)

    def _wait_until_ready(self) -> None:
        asking = Retrying(
            retry=retry_if_exception_type((OSError, asyncpg.PostgresError, redis.RedisError)),
            stop=stop_after_delay(_START_TIMEOUT_S),
            wait=wait_fixed(_POLL_S),  # a server gives no sign when it is ready; it is asked
            before_sleep=lambda _: self._require_running(),
        )
        try:
            asking(self._ask)
        except RetryError:
            self._give_up(f"did not answer within {_START_TIMEOUT_S:.0f} s")

    def _require_running(self) -> None:
        wrapped = self._container.get_wrapped_container()
        wrapped.reload()
        if wrapped.status not in ("created", "running"):
            self._give_up("ended while starting")

    def _give_up(self, problem: str) -> NoReturn:
        log = self._container.get_wrapped_container().logs(tail=_LOG_LINES)
        text = log.decode(errors="replace").strip()
        raise ContainerError(f"The container of {self._container.image} {problem}:\n{text}")

    @abstractmethod
    def _ask(self) -> None:
        """Have the server answer once, or raise."""


class ContainerPostgres(_Server):
    """A PostgreSQL of any version, with a password of its own."""

    def __init__(self, image: str, *, durable: bool, in_memory: bool) -> None:
        settings = SETTINGS | ({} if durable else FORGETFUL_SETTINGS)
        password = secrets.token_urlsafe(12)
        container = PostgresContainer(
            image, username="postgres", password=password, dbname="postgres"
        )
        if in_memory:
            container.with_env("PGDATA", "/memory/data").with_tmpfs_mount("/memory")
        container.with_env("LANG", "C.UTF-8")  # of which initdb makes the encoding
        container.with_command(
            ["postgres", *(f"--{name}={value}" for name, value in settings.items())]
        )
        container.with_kwargs(shm_size="256m")
        super().__init__(container, 5432)
        self.url = f"postgresql+asyncpg://postgres:{password}@{self._host}:{self._port}/postgres"

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop as `pg_ctl stop` does; "smart" waits until the last client has left."""
        self._end(STOP_SIGNALS[mode])

    def _ask(self) -> None:
        with closing(Beside()) as beside:
            beside.run(self._connect())

    async def _connect(self) -> None:
        connection = await asyncpg.connect(self.url.replace("+asyncpg", ""), timeout=5)
        await connection.close()


class ContainerRedis(_Server):
    """A Redis, or a Valkey, that never evicts."""

    def __init__(self, image: str) -> None:
        container = DockerContainer(image).with_command(["sh", "-c", _REDIS_SERVER])
        super().__init__(container, 6379)
        self.url = f"redis://{self._host}:{self._port}/0"

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End at once, as a crash would."""
        self._end(signal.SIGKILL)

    def _ask(self) -> None:
        with redis.Redis.from_url(self.url, socket_timeout=5) as client:
            client.ping()
