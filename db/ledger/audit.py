"""The audit: who changed what, through which job and claim, in the transaction of the change."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.types import UserDefinedType
from sqlmodel import SQLModel

from db.ledger.job import SCHEMA, Claim

PAGE_ROWS = 1_000


class Xid8(UserDefinedType[str]):
    """PostgreSQL's 64-bit transaction id, which never wraps around."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "xid8"


audit = sa.Table(
    "audit",
    SQLModel.metadata,
    sa.Column("job_id", sa.Uuid, primary_key=True),
    sa.Column("chunk_no", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("entry_no", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at", TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
    sa.Column("xid", Xid8, nullable=False, server_default=sa.text("pg_current_xact_id()")),
    sa.Column("claim_id", sa.Uuid, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("actor", sa.Text),
    sa.Column("correlation_id", sa.Text),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("table_name", sa.Text, nullable=False),
    sa.Column("rows", sa.BigInteger, nullable=False),
    sa.Column("keys", JSONB, nullable=False),
    sa.Column("before", JSONB),
    sa.Column("before_sensitive", JSONB),
    sa.Column("version", sa.BigInteger),
    sa.Index("ix_audit_xid", "xid"),
    schema=SCHEMA,
    postgresql_partition_by="RANGE (job_id)",
)


@dataclass(frozen=True)
class Keys:
    """Which rows were touched.

    `ranges` are [first, last] of an integer key, both inclusive: blocks taken from the key's
    sequence for this chunk alone, so that the chunk's rows are exactly those of the table inside
    them. `keys` lists the key values where the key is of another kind.
    """

    ranges: Sequence[tuple[int, int]] | None = None
    keys: Sequence[Sequence[Any]] | None = None

    def as_json(self) -> dict[str, Any]:
        if self.ranges is not None:
            return {"ranges": [list(pair) for pair in self.ranges]}
        return {"keys": [_plain_key(key) for key in self.keys or ()]}

    def as_summary(self) -> dict[str, Any]:
        """For the log: ranges in full; of keys of another kind their number, first and last."""
        if self.ranges is not None or not self.keys:
            return self.as_json()
        first, last = _plain_key(self.keys[0]), _plain_key(self.keys[-1])
        return {"count": len(self.keys), "first": first, "last": last}


def _plain_key(key: Sequence[Any]) -> list[Any]:
    return [_plain(value) for value in key]


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else str(value)


@dataclass(frozen=True)
class Entry:
    """One line of the audit."""

    action: str
    table_name: str
    rows: int
    keys: Keys


@dataclass(frozen=True)
class Changes:
    """Rows of a table that were changed: how many by action."""

    table_name: str
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Journal:
    """Where the rows that a chunk changes are written down by the statement that changes them.

    `first_entry` leaves room for the chunk's other lines, which stand before these.
    """

    held: Claim
    chunk_no: int
    table_name: str
    first_entry: int

    def sql(self, source: str, action: str) -> tuple[str, dict[str, Any]]:
        """A statement that writes a line for each row of the source, and what it binds.

        The source has row_no, once each, key as a JSON array, before, before_sensitive, and the
        version that the row had, null in a table that counts none.
        """
        statement = (
            "INSERT INTO bulwark.audit (job_id, chunk_no, entry_no, claim_id, kind, actor, "
            "correlation_id, action, table_name, rows, keys, before, before_sensitive, version) "
            "SELECT :job_id, :chunk_no, :first_entry + row_no, :claim_id, :kind, "
            "CAST(:actor AS text), CAST(:correlation_id AS text), :action, :table_name, 1, "
            "jsonb_build_object('keys', jsonb_build_array(key)), before, before_sensitive, version "
            f"FROM {source}"
        )
        return statement, {
            "job_id": self.held.job_id,
            "chunk_no": self.chunk_no,
            "first_entry": self.first_entry,
            "action": action,
            "table_name": self.table_name,
            **_who(self.held),
        }


ORIGIN_TYPES = {
    "job_id": sa.Uuid,
    "chunk_no": sa.Integer,
    "claim_id": sa.Uuid,
    "kind": sa.Text,
    "actor": sa.Text,
    "correlation_id": sa.Text,
}


@dataclass(frozen=True)
class Origin:
    """Whose a change is: the claim, and the chunk of its job, 0 in a job of one transaction."""

    held: Claim
    chunk_no: int = 0

    @cached_property
    def row(self) -> Mapping[str, Any]:
        """The columns of ORIGIN_TYPES."""
        return {"job_id": self.held.job_id, "chunk_no": self.chunk_no, **_who(self.held)}


def insert_lines_sql(source: str) -> str:
    """A statement that writes a line for each row of the source, which may be of many origins.

    The source has the columns of ORIGIN_TYPES, the place among the lines of its origin, action,
    table_name, keys as a JSON array of keys, before, and version.
    """
    origin = ", ".join(ORIGIN_TYPES)
    return (
        f"INSERT INTO bulwark.audit ({origin}, entry_no, action, table_name, rows, keys, before, "
        f"version) SELECT {origin}, row_number() OVER (PARTITION BY job_id, chunk_no "
        "ORDER BY place, table_name, keys) - 1, action, table_name, jsonb_array_length(keys), "
        f"jsonb_build_object('keys', keys), before, version FROM {source}"
    )


async def write_entries(
    session: AsyncSession, held: Claim, chunk_no: int, entries: Sequence[Entry]
) -> None:
    """Write the audit of what a chunk inserted, in its transaction."""
    if entries:
        common = {"job_id": held.job_id, "chunk_no": chunk_no, **_who(held)}
        rows = [
            {
                **common,
                "entry_no": number,
                "action": entry.action,
                "table_name": entry.table_name,
                "rows": entry.rows,
                "keys": entry.keys.as_json(),
            }
            for number, entry in enumerate(entries)
        ]
        await session.execute(sa.insert(audit), rows)


def _who(held: Claim) -> dict[str, Any]:
    return {
        "claim_id": held.claim_id,
        "kind": held.kind,
        "actor": held.actor,
        "correlation_id": held.correlation_id,
    }


_PUBLIC = (
    audit.c.job_id,
    audit.c.chunk_no,
    audit.c.entry_no,
    audit.c.at,
    sa.cast(audit.c.xid, sa.Text).label("xid"),
    audit.c.claim_id,
    audit.c.kind,
    audit.c.actor,
    audit.c.correlation_id,
    audit.c.action,
    audit.c.table_name,
    audit.c.rows,
    audit.c["keys"],
    audit.c.before,
    audit.c.version,
)


async def read_entries(
    session: AsyncSession,
    *,
    job_id: UUID | None = None,
    table_name: str | None = None,
    most: int = 100,
) -> list[Mapping[str, Any]]:
    """The newest first, or those of one job in order; sensitive before-values stay inside."""
    query = sa.select(*_PUBLIC).limit(most)
    if table_name is not None:
        query = query.where(audit.c.table_name == table_name)
    if job_id is not None:
        query = query.where(audit.c.job_id == job_id).order_by(audit.c.chunk_no, audit.c.entry_no)
    else:
        query = query.order_by(audit.c.job_id.desc(), audit.c.chunk_no.desc())
    return [dict(row) for row in (await session.execute(query)).mappings()]


async def each_entry(
    session: AsyncSession, job_id: UUID | None = None
) -> AsyncIterator[Mapping[str, Any]]:
    """Every entry, or every one of a job, in order; sensitive before-values stay inside.

    They are read by a cursor, a few at a time, as they were when the first was read.
    """
    query = sa.select(*_PUBLIC).order_by(audit.c.job_id, audit.c.chunk_no, audit.c.entry_no)
    if job_id is not None:
        query = query.where(audit.c.job_id == job_id)
    rows = await session.stream(query.execution_options(yield_per=PAGE_ROWS))
    async for row in rows.mappings():
        yield dict(row)
