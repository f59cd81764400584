"""COPY into a table, on the connection and in the transaction of a session."""

from collections.abc import AsyncIterator, Iterable, Sequence
from itertools import islice
from typing import Any, Final

import asyncpg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db import steps
from db.refusal import NOT_ENCODED, UNENCODABLE, RowFault
from db.steps import Step

BLOCK_LINES: Final = 2000


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


async def copy_rows(
    session: AsyncSession,
    table_name: str,
    schema_name: str | None,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
) -> None:
    """COPY rows in by values; RowFault if one is refused, which fails transaction or savepoint.

    What asyncpg remembers of the columns is forgotten first: it goes by the table's name, behind
    which another table may stand by now, and would encode the values for that one.
    """
    connection = await asyncpg_connection(session)
    await connection.reload_schema_state()
    try:
        await connection.copy_records_to_table(
            table_name, schema_name=schema_name, columns=list(columns), records=rows
        )
    except UNENCODABLE as error:
        raise RowFault(NOT_ENCODED, error) from error


async def copy_lines(
    session: AsyncSession,
    table_name: str,
    schema_name: str | None,
    columns: Sequence[str],
    lines: Iterable[str],
) -> None:
    """COPY rows in as lines of the text format without the newline; RowFault as `copy_rows`."""
    connection = await asyncpg_connection(session)
    try:
        await connection.copy_to_table(
            table_name,
            schema_name=schema_name,
            columns=list(columns),
            source=_blocks(lines),
            format="text",
        )
    except UnicodeEncodeError as error:
        raise RowFault(NOT_ENCODED, error) from error


async def _blocks(lines: Iterable[str]) -> AsyncIterator[bytes]:
    rest = iter(lines)
    while block := list(islice(rest, BLOCK_LINES)):
        block.append("")
        yield "\n".join(block).encode()
        steps.reached(Step.COPYING)
