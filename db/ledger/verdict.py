"""Verdicts: what became of each input row; those that need a look stand here row by row."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from enum import StrEnum
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

from db.copy import copy_records
from db.ledger.job import SCHEMA


class Verdict(StrEnum):
    """The closed list of what can become of an input row; the counts sum to the input."""

    INSERTED = "inserted"
    UPDATED = "updated"
    UNCHANGED = "unchanged"
    SKIPPED = "skipped"
    REVIVED = "revived"
    REPLACED = "replaced"
    DELETED = "deleted"
    RESTORED = "restored"
    MOVED = "moved"
    PURGED = "purged"
    MISSING = "missing"
    CONFLICT = "conflict"
    KEPT = "kept"
    REJECTED = "rejected"
    NOT_REACHED = "not_reached"


WITHOUT_EFFECT = frozenset(
    {
        Verdict.UNCHANGED,
        Verdict.SKIPPED,
        Verdict.MISSING,
        Verdict.CONFLICT,
        Verdict.KEPT,
        Verdict.REJECTED,
        Verdict.NOT_REACHED,
    }
)
"""Verdicts on rows that have changed nothing: those may be judged once more."""

verdict = sa.Table(
    "verdict",
    SQLModel.metadata,
    sa.Column("job_id", sa.Uuid, primary_key=True),
    sa.Column("row_no", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("chunk_no", sa.Integer, nullable=False),
    sa.Column("line", sa.BigInteger),
    sa.Column("verdict", sa.Text, nullable=False),
    sa.Column("code", sa.Text, nullable=False),
    sa.Column("column", sa.Text),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("raw", sa.LargeBinary),
    sa.CheckConstraint("verdict IN ('rejected', 'conflict', 'missing', 'kept')", name="verdict"),
    schema=SCHEMA,
    postgresql_partition_by="RANGE (job_id)",
)


@dataclass(frozen=True)
class RowVerdict:
    """One row that was not taken as it is: where it stands, why, and its bytes as they came."""

    row_no: int
    chunk_no: int
    line: int | None
    verdict: str
    code: str
    column: str | None
    message: str
    raw: bytes | None


_FIELDS = tuple(RowVerdict.__dataclass_fields__)


async def write_verdicts(
    session: AsyncSession, job_id: UUID, verdicts: Sequence[RowVerdict]
) -> None:
    """Write the per-row records of a chunk, in its transaction."""
    if verdicts:
        await copy_records(
            session,
            verdict,
            ("job_id", *_FIELDS),
            [(job_id, *astuple(record)) for record in verdicts],
        )


async def read_verdicts(
    session: AsyncSession,
    job_id: UUID,
    *,
    after_row: int = 0,
    most: int = 1000,
    with_raw: bool = True,
) -> list[RowVerdict]:
    """A page of the per-row records in input order; without their bytes these are None."""
    columns = {**verdict.c, **({} if with_raw else {"raw": sa.null()})}
    rows = await session.execute(
        sa.select(*(columns[name] for name in _FIELDS))
        .where(verdict.c.job_id == job_id, verdict.c.row_no > after_row)
        .order_by(verdict.c.row_no)
        .limit(most)
    )
    return [RowVerdict(*row) for row in rows]
