"""COPY into a table, on the connection and in the transaction of a session."""

from collections.abc import Iterable, Sequence
from typing import Any

import asyncpg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession


async def asyncpg_connection(session: AsyncSession) -> "asyncpg.Connection[Any]":
    """The asyncpg connection under a session.

    The transaction exists on it only after the session's first statement; what is raised on it
    are asyncpg's errors, not SQLAlchemy's.
    """
    raw = await (await session.connection()).get_raw_connection()
    connection: asyncpg.Connection[Any] = raw.driver_connection
    return connection


async def copy_records(
    session: AsyncSession,
    table: sa.Table,
    columns: Sequence[str],
    records: Iterable[Sequence[Any]],
) -> None:
    """Send records by binary COPY in the session's transaction, which it begins if need be.

    The first record that PostgreSQL refuses fails them all. JSON columns take text. Raises
    asyncpg.PostgresError, or asyncpg.DataError for a value that does not fit its column.
    """
    connection = await asyncpg_connection(session)
    if not connection.is_in_transaction():
        await session.execute(sa.text("SELECT"))
    await connection.copy_records_to_table(
        table.name, schema_name=table.schema, columns=list(columns), records=records
    )
