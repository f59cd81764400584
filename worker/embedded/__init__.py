"""PostgreSQL and Valkey from wheels: real servers for development, the demo and the tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from worker.embedded.home import open_home
from worker.embedded.postgres import EmbeddedPostgres, postgres_program
from worker.embedded.server import EmbeddedServerError, running
from worker.embedded.valkey import EmbeddedValkey, free_port, valkey_program

__all__ = [
    "Embedded",
    "EmbeddedPostgres",
    "EmbeddedServerError",
    "EmbeddedValkey",
    "embedded_postgres",
    "embedded_servers",
    "embedded_valkey",
    "free_port",
    "postgres_program",
    "valkey_program",
]


@dataclass(frozen=True)
class Embedded:
    """Where the running servers are found, and the folder that holds their files."""

    database_url: str
    redis_url: str
    folder: Path


@contextmanager
def embedded_servers(
    folder: Path | None = None, *, durable: bool = True, in_memory: bool = False
) -> Iterator[Embedded]:
    """Run PostgreSQL and Valkey while the block lasts.

    Without a folder everything lives in a temporary one, gone afterwards; a given folder keeps the
    database for the next time. Both servers end with the process that started them, even when it
    is killed. Not durable is faster and loses the database when the machine stops; so does a
    temporary folder in memory, where databases are made with less work.
    """
    with (
        open_home(folder, in_memory=in_memory) as home,
        running(EmbeddedPostgres(home, durable=durable)) as postgres,
        running(EmbeddedValkey(home)) as valkey,
    ):
        yield Embedded(postgres.url, valkey.url, home.folder)


@contextmanager
def embedded_postgres(
    folder: Path | None = None, *, durable: bool = True
) -> Iterator["EmbeddedPostgres"]:
    """Run a PostgreSQL that the block may stop and start; see embedded_servers."""
    with open_home(folder) as home, running(EmbeddedPostgres(home, durable=durable)) as postgres:
        yield postgres


@contextmanager
def embedded_valkey(folder: Path | None = None) -> Iterator["EmbeddedValkey"]:
    """Run a Valkey that the block may stop and start; see embedded_servers."""
    with open_home(folder) as home, running(EmbeddedValkey(home)) as valkey:
        yield valkey
