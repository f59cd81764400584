"""Months of the ledger that are long over, and ids of jobs that were accepted in them."""

from datetime import datetime, timedelta
from uuid import UUID, uuid4

import asyncpg


def id_at(at: datetime) -> UUID:
    """An id of a job that was accepted then."""
    return UUID(f"{round(at.timestamp() * 1000):012x}7000800000000000{uuid4().hex[:4]}")


async def make_month(connection: asyncpg.Connection, table: str, at: datetime) -> str:
    """The partition of a month long ago."""
    name = f"{table}_{at:%Y_%m}"
    low = at.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    high = (low + timedelta(days=32)).replace(day=1)
    await connection.execute(
        f"CREATE TABLE bulwark.{name} PARTITION OF bulwark.{table}"
        f" FOR VALUES FROM ('{str(id_at(low))[:13]}-0000-0000-000000000000')"
        f" TO ('{str(id_at(high))[:13]}-0000-0000-000000000000')"
    )
    return name
