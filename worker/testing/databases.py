"""Databases for tests: one template, brought to the newest migration once, and copies of it."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Self

from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool

from db.engine import make_sessions
from worker.testing.beside import Beside


@dataclass(frozen=True)
class Database:
    """A migrated database: its URL, and sessions on it like those of the program."""

    url: str
    sessions: async_sessionmaker[AsyncSession]

    @classmethod
    def at(cls, url: str) -> Self:
        """No connection outlives its session, so that they serve any event loop, one at a time."""
        return cls(url, make_sessions(create_async_engine(url, poolclass=NullPool)))


Prepare = Callable[[str], object]
"""Makes the tables of an empty database, whose URL it is given."""


class Databases:
    """Copies of one template on a server that may serve other test runs as well."""

    def __init__(self, server_url: str, prepare: Prepare) -> None:
        self._server_url = server_url
        self._beside = Beside()
        self._server = create_async_engine(  # one connection, since each costs PostgreSQL a process
            server_url, pool_size=1, pool_pre_ping=True, isolation_level="AUTOCOMMIT"
        )
        self._prepare = prepare
        self._run = f"bulwark_test_{secrets.token_hex(4)}"
        self._numbers = count()
        self._template: str | None = None

    @contextmanager
    def fresh(self) -> Iterator[str]:
        """The URL of a prepared database that nobody else sees; its connections end with it."""
        with self._made(f"TEMPLATE {self._prepared()}") as url:
            yield url

    @contextmanager
    def empty(self) -> Iterator[str]:
        """The URL of a database without any table."""
        with self._made("") as url:
            yield url

    def close(self) -> None:
        """Drop the template; no database can be made any more."""
        if self._template is not None:
            self._drop(self._template)
            self._template = None
        self._beside.run(self._server.dispose())
        self._beside.close()

    def _prepared(self) -> str:
        if self._template is None:
            name = f"{self._run}_template"
            self._execute(f"CREATE DATABASE {name}")
            with ExitStack() as unless_prepared:
                unless_prepared.callback(self._drop, name)
                self._prepare(self._url(name))
                unless_prepared.pop_all()
            self._template = name
        return self._template

    @contextmanager
    def _made(self, how: str) -> Iterator[str]:
        name = f"{self._run}_{next(self._numbers)}"
        self._execute(f"CREATE DATABASE {name} {how}")
        try:
            yield self._url(name)
        finally:
            self._drop(name)

    def _drop(self, name: str) -> None:
        self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    def _url(self, name: str) -> str:
        return make_url(self._server_url).set(database=name).render_as_string(hide_password=False)

    def _execute(self, statement: str) -> None:
        self._beside.run(self._executed(statement))

    async def _executed(self, statement: str) -> None:
        async with self._server.connect() as connection:
            await connection.exec_driver_sql(statement)
