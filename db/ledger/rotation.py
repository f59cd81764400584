"""How the ledger grows old: months that are dropped, and rows that are in none of them."""

from typing import Literal

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

Rotated = Literal["chunk", "verdict", "audit", "spool"]
ROTATED: tuple[Rotated, ...] = ("chunk", "verdict", "audit", "spool")
"""The tables that are partitioned by the month of the job."""

_BEFORE = "now() - make_interval(days => :days)"
_DROP_PARTITIONS = sa.text(f"SELECT bulwark.drop_partitions(:parent, {_BEFORE})")
_DROP_STRAYS = sa.text(f"SELECT bulwark.drop_strays(:parent, {_BEFORE}, :most)")


async def ensure_partitions(session: AsyncSession) -> None:
    """Make the partitions of the coming months."""
    await session.execute(sa.text("SELECT bulwark.ensure_partitions()"))


async def drop_partitions(session: AsyncSession, parent: Rotated, days: int) -> list[str]:
    """Drop the months all of which are older, but for those of jobs that may still run.

    Returns the names of the partitions.
    """
    asked = {"parent": parent, "days": days}
    names: list[str] = (await session.execute(_DROP_PARTITIONS, asked)).scalar_one()
    return names


async def drop_strays(session: AsyncSession, parent: Rotated, days: int, most: int) -> int:
    """Delete older rows of the default partition, a batch at a time. Returns how many went."""
    asked = {"parent": parent, "days": days, "most": most}
    gone: int = (await session.execute(_DROP_STRAYS, asked)).scalar_one()
    return gone
