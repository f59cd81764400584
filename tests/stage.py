"""A database on which sample jobs leave notes, seen from beside, with a gate that holds them up."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from tests.sample_jobs.act_out import GATE, NOTES
from tests.workers import until

SAMPLE_JOBS = (
    "tests.sample_jobs.act_out",
    "tests.sample_jobs.take_down",
    "tests.sample_jobs.write_notes",
)
_AT_GATE = f"""
    SELECT count(*) FROM pg_locks
     WHERE locktype = 'advisory' AND objid = {GATE} AND NOT granted
       AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


class Stage:
    """One database through a connection of its own, whatever the workers' connections suffer."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def value(self, sql: str, *arguments: object) -> Any:
        return await self._connection.fetchval(sql, *arguments)

    async def rows(self, sql: str, *arguments: object) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in await self._connection.fetch(sql, *arguments)]

    async def execute(self, sql: str) -> None:
        """Run any number of statements."""
        await self._connection.execute(sql)

    async def row(self, job_id: UUID) -> dict[str, Any]:
        """The job's row."""
        found = await self._connection.fetchrow("SELECT * FROM bulwark.job WHERE id = $1", job_id)
        return dict(found or {})

    async def ended_as(self, job_id: UUID) -> tuple[str, str | None, int]:
        """State, reason and attempts."""
        row = await self.row(job_id)
        return row["state"], row["reason"], row["attempt"]

    async def notes(self) -> list[str]:
        """What the jobs have committed, in the order of writing."""
        rows = await self._connection.fetch("SELECT text FROM note ORDER BY id")
        return [row["text"] for row in rows]

    async def make_due(self, job_id: UUID) -> None:
        """Let the job's backoff be over."""
        await self.value(
            "UPDATE bulwark.job SET run_at = now(), next_ring_at = now() WHERE id = $1", job_id
        )

    async def close_gate(self) -> None:
        await self.value(f"SELECT pg_advisory_lock({GATE})")

    async def open_gate(self) -> None:
        await self.value(f"SELECT pg_advisory_unlock({GATE})")

    async def somebody_at_gate(self, number: int = 1) -> None:
        async def waits() -> bool:
            return bool(await self.value(_AT_GATE) >= number)

        await until(waits, f"{number} jobs wait at the gate")

    async def becomes(self, job_id: UUID, state: str, within_s: float = 90.0) -> dict[str, Any]:
        """The job's row once it is in this state."""

        async def look() -> dict[str, Any] | None:
            row = await self.row(job_id)
            return row if row["state"] == state else None

        return await until(look, f"the job is {state}", within_s)


@asynccontextmanager
async def stage_on(database_url: str) -> AsyncIterator[Stage]:
    """A stage with an empty table of notes."""
    async with connected(database_url) as connection:
        await connection.execute(NOTES)
        yield Stage(connection)


@asynccontextmanager
async def connected(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A plain connection, of no engine, closed at the end."""
    connection = await asyncpg.connect(database_url.replace("+asyncpg", ""))
    try:
        yield connection
    finally:
        await connection.close()


async def waiting_for_a_lock(sessions: async_sessionmaker[AsyncSession]) -> bool:
    """Whether a statement in this database waits for another transaction, not for the gate."""
    async with sessions() as session:
        return bool(
            await session.scalar(
                sa.text(
                    "SELECT count(*) FROM pg_stat_activity "
                    "WHERE datname = current_database() "
                    "AND wait_event_type = 'Lock' AND wait_event <> 'advisory'"
                )
            )
        )
