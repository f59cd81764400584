"""Where it is measured: a durable PostgreSQL and a Valkey of its own, and worker processes."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
from pydantic import SecretStr
from sqlalchemy.engine import make_url

from db.migrations import upgrade
from jobs._producer import Producer
from tests.benchmarks.cpu import tree_cpu_s
from tests.workers import environment, until
from worker.child import STOP_MARGIN_S, worker_process
from worker.connection import open_ledger, open_producer
from worker.embedded import (
    EmbeddedPostgres,
    EmbeddedValkey,
    embedded_postgres,
    embedded_valkey,
    postgres_program,
)
from worker.settings import Settings

JOB_TIMEOUT_S = 600.0


class PsqlFailed(Exception):
    """psql did not carry out its commands; the message is what it said."""


@dataclass
class Site:
    """The two servers, and a connection to look and to prepare with."""

    postgres: EmbeddedPostgres
    valkey: EmbeddedValkey
    connection: asyncpg.Connection
    folder: Path

    def settings(self, **more: Any) -> Settings:
        """Those of a producer here, whatever the environment says."""
        return Settings.model_construct(
            database_url=SecretStr(self.postgres.url), redis_url=SecretStr(self.valkey.url), **more
        )

    @asynccontextmanager
    async def producer(self, **settings: Any) -> AsyncIterator[Producer]:
        chosen = self.settings(**settings)
        async with open_ledger(chosen) as sessions, open_producer(chosen, sessions) as producer:
            yield producer

    @asynccontextmanager
    async def worker(self, **settings: str) -> AsyncIterator[int]:
        """The process id of a worker that has started; it is asked to stop afterwards."""
        home = self.folder / f"worker-{next(_numbers)}"
        home.mkdir()
        env = environment(self.postgres.url, self.valkey.url, **settings)
        pid_file = home / "worker.pid"  # where the servers' guard finds it
        with (
            (home / "log").open("wb") as log,
            worker_process(
                env, pid_file=pid_file, folder=home, log=log, stop_within_s=STOP_MARGIN_S
            ) as process,
        ):
            await until(lambda: self.registered(process.pid), "the worker has started")
            yield process.pid

    async def registered(self, pid: int) -> bool:
        """Whether the process has made its row as a worker."""
        return bool(
            await self.connection.fetchval(
                "SELECT count(*) FROM bulwark.worker WHERE pid = $1 AND ended_at IS NULL", pid
            )
        )

    async def ended(self, job_id: UUID) -> asyncpg.Record:
        """The job's row as soon as the job has ended."""

        async def look() -> asyncpg.Record | None:
            return await self.connection.fetchrow(
                "SELECT * FROM bulwark.job WHERE id = $1 AND finished_at IS NOT NULL", job_id
            )

        return await until(look, "the job has ended", JOB_TIMEOUT_S)

    async def backend_cpu_s(self) -> float:
        """What PostgreSQL has used so far to serve clients, this site's own connection left out."""
        others = await self.connection.fetch(
            "SELECT pid FROM pg_stat_activity "
            "WHERE backend_type <> 'client backend' OR pid = pg_backend_pid()"
        )
        return tree_cpu_s(self.postgres.pid, without={row["pid"] for row in others})

    async def execute(self, *statements: str) -> None:
        """Each in a transaction of its own, as VACUUM demands."""
        for statement in statements:
            await self.connection.execute(statement)

    async def psql(self, *commands: str) -> None:
        """Run psql once, with all commands in one transaction. Raises PsqlFailed."""
        words = ["--no-psqlrc", "--quiet", "--single-transaction", "--set=ON_ERROR_STOP=1"]
        words += [f"--command={command}" for command in commands]
        process = await asyncio.create_subprocess_exec(
            postgres_program("psql"), *words, env=self._psql_env(), stderr=subprocess.PIPE
        )
        _, said = await process.communicate()
        if process.returncode != 0:
            raise PsqlFailed(said.decode().strip())

    def _psql_env(self) -> dict[str, str]:
        url = make_url(self.postgres.url)
        host, port = url.query["host"], url.query["port"]
        return {
            **os.environ,
            "PGHOST": str(host),
            "PGPORT": str(port),
            "PGUSER": str(url.username),
            "PGDATABASE": str(url.database),
        }


_numbers = count(1)


@asynccontextmanager
async def open_site() -> AsyncIterator[Site]:
    """Servers with fsync on, at the newest migration; all of it is gone afterwards."""
    with embedded_postgres(durable=True) as postgres, embedded_valkey() as valkey:
        upgrade(postgres.url)
        connection = await asyncpg.connect(postgres.url.replace("+asyncpg", ""))
        try:
            yield Site(postgres, valkey, connection, valkey.folder.parent)
        finally:
            await connection.close()
