"""Real servers for every test: a database of its own, an empty Valkey, and what looks at them."""

import logging
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest
import structlog
from arq.connections import ArqRedis
from hypothesis import HealthCheck, settings
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from db.engine import make_sessions
from jobs import discover_jobs
from tests import unusual_models
from tests.arq_side import plain_client
from tests.fuzzing import summary
from tests.inprocess import Bench
from tests.own_servers import OwnRedis, own_redis
from tests.stage import SAMPLE_JOBS, Stage, connected, stage_on
from tests.workers import Start, WorkerProcess, environment, workers
from worker.redis_pool import make_redis
from worker.testing.databases import Database


def pytest_configure() -> None:
    """Let Ctrl-C reach what tests start, and let none fail for its pace."""
    # A shell has it ignored by what runs in the background.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A machine may stand still for seconds; and the inputs of a test share its database.
    unhealthy = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    settings.register_profile("untimed", deadline=None, suppress_health_check=unhealthy)
    settings.load_profile("untimed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell how many inputs were tried, also where several processes have tried them."""
    reports = [one for found in terminalreporter.stats.values() for one in found]
    if (line := summary(reports)) is not None:
        terminalreporter.write_line(line)


@pytest.fixture
def database_url(bulwark_database: Database) -> str:
    """A migrated database that no other test sees; it disappears with its connections."""
    return bulwark_database.url


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    """An engine on the test's database."""
    engine = create_async_engine(database_url)
    yield engine
    await engine.dispose()


@pytest.fixture
def sessions(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    """Sessions on the test's database, like those of the program."""
    return make_sessions(engine)


@pytest.fixture
def redis_url(bulwark_redis_url: str) -> str:
    """An empty logical database; pub/sub channels are shared by all of them."""
    return bulwark_redis_url


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A look at the test's database beside its engine."""
    async with connected(database_url) as connection:
        yield connection


@pytest.fixture
async def stage(database_url: str) -> AsyncIterator[Stage]:
    """Where the sample jobs leave their notes."""
    async with stage_on(database_url) as stage:
        yield stage


@pytest.fixture
def bench(sessions: async_sessionmaker[AsyncSession], database_url: str) -> Bench:
    """Knows the sample jobs, too."""
    return Bench(sessions, database_url, discover_jobs(SAMPLE_JOBS))


@pytest.fixture
async def unusual_tables(engine: AsyncEngine) -> None:
    """The tables of the unusual models."""
    async with engine.begin() as connection:
        await connection.run_sync(unusual_models.metadata.create_all)


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[ArqRedis]:
    """A plain arq client."""
    async with plain_client(redis_url) as client:
        yield client


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[ArqRedis]:
    """A client as the program has it."""
    async with make_redis(redis_url, 5.0) as redis:
        yield redis


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts workers, which end with the test."""
    with workers(tmp_path) as start:
        yield start


@pytest.fixture
def env(database_url: str, redis_url: str) -> dict[str, str]:
    """The environment of a process that works on the test's servers."""
    return environment(database_url, redis_url)


@pytest.fixture
def worker(env: dict[str, str], start: Start) -> WorkerProcess:
    """A worker on the test's servers, as it is without further settings."""
    return start(env)


@pytest.fixture
def valkey() -> Iterator[OwnRedis]:
    """One of the test's own, to be stopped and emptied."""
    with own_redis() as server:
        yield server


@pytest.fixture(autouse=True)
def logging_left_as_it_was() -> Iterator[None]:
    """The command line configures the logging of its process, which is the tests' here."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
    structlog.reset_defaults()
