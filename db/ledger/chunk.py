"""Chunk receipts: one row per committed part of a job, written in the transaction of its effect."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP, insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

from db.errors import AlreadyCommitted
from db.ledger.job import SCHEMA, Claim

SELECTION = -1
"""The number of the receipt that fixes which rows a filter selected."""

OPENING = 0
"""The number of the receipt that fixes what the input is; the chunks of rows count from 1."""

ALONG = "along"
"""In a receipt's detail: by table, how many rows of others were changed with those of the input."""

REST = "rest"
"""In the detail of a receipt that only counts the rows which were not reached, be it none."""

chunk = sa.Table(
    "chunk",
    SQLModel.metadata,
    sa.Column("job_id", sa.Uuid, primary_key=True),
    sa.Column("chunk_no", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("claim_id", sa.Uuid, nullable=False),
    sa.Column("first_row", sa.BigInteger, nullable=False),
    sa.Column("rows", sa.Integer, nullable=False),
    sa.Column("filtered", sa.Integer, nullable=False),
    sa.Column("start_byte", sa.BigInteger, nullable=False),
    sa.Column("end_byte", sa.BigInteger, nullable=False),
    sa.Column("first_line", sa.BigInteger, nullable=False),
    sa.Column("next_line", sa.BigInteger, nullable=False),
    sa.Column("counts", JSONB, nullable=False),
    sa.Column("detail", JSONB),
    sa.Column(
        "committed_at", TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()
    ),
    schema=SCHEMA,
    postgresql_partition_by="RANGE (job_id)",
)


@dataclass(frozen=True)
class Span:
    """The part of the input that a chunk covers: rows, bytes from start to end, lines."""

    first_row: int
    rows: int
    start_byte: int
    end_byte: int
    first_line: int
    next_line: int


@dataclass(frozen=True)
class Receipt:
    """What one committed chunk did. `filtered` rows were left out by a filter and are no input."""

    chunk_no: int
    span: Span
    filtered: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    detail: Mapping[str, Any] | None = None


async def take_receipt(session: AsyncSession, held: Claim, chunk_no: int, span: Span) -> None:
    """Reserve the chunk's receipt, before its effects.

    Waits for a transaction that is still committing the same chunk. Raises AlreadyCommitted,
    with the receipt, when one has.
    """
    taken = await session.execute(
        insert(chunk)
        .values(
            job_id=held.job_id,
            chunk_no=chunk_no,
            claim_id=held.claim_id,
            filtered=0,
            counts={},
            **vars(span),
        )
        .on_conflict_do_nothing()
        .returning(chunk.c.chunk_no)
    )
    if taken.one_or_none() is None:
        raise AlreadyCommitted(await read_receipt(session, held.job_id, chunk_no))


async def fill_receipt(session: AsyncSession, held: Claim, receipt: Receipt) -> None:
    """Complete a reserved receipt with what became of the rows; the span may have shrunk."""
    await session.execute(
        sa.update(chunk)
        .where(chunk.c.job_id == held.job_id, chunk.c.chunk_no == receipt.chunk_no)
        .values(
            filtered=receipt.filtered,
            counts=dict(receipt.counts),
            detail=None if receipt.detail is None else dict(receipt.detail),
            **vars(receipt.span),
        )
    )


_COLUMNS = (
    chunk.c.chunk_no,
    chunk.c.first_row,
    chunk.c.rows,
    chunk.c.start_byte,
    chunk.c.end_byte,
    chunk.c.first_line,
    chunk.c.next_line,
    chunk.c.filtered,
    chunk.c.counts,
    chunk.c.detail,
)


def _receipt(row: Sequence[Any]) -> Receipt:
    number, *span, filtered, counts, detail = row
    return Receipt(number, Span(*span), filtered, counts, detail)


async def read_receipt(session: AsyncSession, job_id: UUID, chunk_no: int) -> Receipt | None:
    """One committed receipt."""
    row = (
        await session.execute(
            sa.select(*_COLUMNS).where(chunk.c.job_id == job_id, chunk.c.chunk_no == chunk_no)
        )
    ).one_or_none()
    return None if row is None else _receipt(tuple(row))


async def last_receipt(session: AsyncSession, job_id: UUID) -> Receipt | None:
    """The receipt with the highest number, if any chunk is begun; they are committed in order."""
    row = (
        await session.execute(
            sa.select(*_COLUMNS)
            .where(chunk.c.job_id == job_id, chunk.c.chunk_no >= OPENING)
            .order_by(chunk.c.chunk_no.desc())
            .limit(1)
        )
    ).one_or_none()
    return None if row is None else _receipt(tuple(row))


@dataclass(frozen=True)
class Tally:
    """All committed chunks of a job added up; `bytes` is how far into the input they reach."""

    chunks: int
    rows: int
    filtered: int
    bytes: int
    counts: Mapping[str, int]


_TALLY = sa.text(
    """
    SELECT count(*) FILTER (WHERE chunk_no > 0) AS chunks,
           coalesce(sum(rows), 0)::bigint AS rows,
           coalesce(sum(filtered), 0)::bigint AS filtered,
           coalesce(max(end_byte), 0) AS bytes,
           coalesce((SELECT jsonb_object_agg(key, total) FROM (
               SELECT key, sum(value::bigint) AS total
                 FROM bulwark.chunk, jsonb_each_text(counts) WHERE job_id = :job_id GROUP BY key
           ) AS totals), '{}') AS counts
      FROM bulwark.chunk WHERE job_id = :job_id
    """
).columns(counts=JSONB)


async def tally(session: AsyncSession, job_id: UUID) -> Tally:
    """Add up what the job has committed so far."""
    row = (await session.execute(_TALLY, {"job_id": job_id})).one()
    return Tally(**row._mapping)


_ALONG = sa.text(
    """
    SELECT key, sum(value::bigint)::bigint FROM bulwark.chunk, jsonb_each_text(detail -> :along)
     WHERE job_id = :job_id AND chunk_no > 0 GROUP BY key ORDER BY key
    """
)


async def changed_along(session: AsyncSession, job_id: UUID) -> dict[str, int]:
    """By table, how many rows the job has changed with those of its input."""
    rows = await session.execute(_ALONG, {"job_id": job_id, "along": ALONG})
    return {row[0]: row[1] for row in rows}


async def report(session: AsyncSession, job_id: UUID) -> dict[str, Any]:
    """What has become of the rows so far, for the outcome of the job."""
    done = await tally(session, job_id)
    along = await changed_along(session, job_id)
    told = {"rows": done.rows, "filtered": done.filtered, "verdicts": dict(done.counts)}
    return {**told, "along": along} if along else told


async def read_details(
    session: AsyncSession, job_id: UUID, key: str
) -> list[tuple[Mapping[str, int], Mapping[str, Any]]]:
    """Counts and detail of the receipts whose detail has this key, in order."""
    rows = await session.execute(
        sa.select(chunk.c.counts, chunk.c.detail)
        .where(chunk.c.job_id == job_id, chunk.c.detail.has_key(key))
        .order_by(chunk.c.chunk_no)
    )
    return [(counts, detail) for counts, detail in rows]
