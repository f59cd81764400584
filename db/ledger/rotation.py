"""How the ledger grows old: months that are dropped, and rows that are in none of them."""

from typing import Literal

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

from db.catalog import read_facts
from db.due_rows import ROW, DueRows, due_rows, read_cutoffs
from db.ledger.audit import Xid8
from db.ledger.job import ENDED, SCHEMA, job

Rotated = Literal["chunk", "verdict", "audit", "spool"]
ROTATED: tuple[Rotated, ...] = ("chunk", "verdict", "audit", "spool")
"""The tables that are partitioned by the month of the job."""

rotation = sa.Table(
    "rotation",
    SQLModel.metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("month", sa.Date, nullable=False),
    sa.Column("at", TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
    sa.Column("role", sa.Text, nullable=False, server_default=sa.text("SESSION_USER")),
    sa.Column("xid", Xid8, nullable=False, server_default=sa.text("pg_current_xact_id()")),
    schema=SCHEMA,
)
"""Months whose rows in the audit were dropped; written by the functions that drop them alone."""

_BEFORE = "now() - make_interval(days => :days)"
_DROP_PARTITIONS = sa.text(f"SELECT bulwark.drop_partitions(:parent, {_BEFORE})")
_CUTOFF = "CAST(CAST($1 AS text) AS timestamptz)"
_STATES = ", ".join(f"'{state}'" for state in ENDED)
_ENDED_JOBS = (
    f"{ROW}.id < bulwark.uuid_floor({_CUTOFF}) AND {ROW}.finished_at < {_CUTOFF} "
    f"AND {ROW}.state IN ({_STATES}) AND NOT ({ROW}.id IN "
    "(SELECT job_id FROM bulwark.idempotency WHERE expires_at > now()))"
)
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


async def ended_jobs(session: AsyncSession, days: int) -> DueRows:
    """The jobs that were accepted and have ended so long ago, whose key is not remembered."""
    cutoffs = await read_cutoffs(session, {"job": days})
    facts = await read_facts(session, job)
    return await due_rows(session, facts, ("id",), _ENDED_JOBS, cutoffs["job"])
