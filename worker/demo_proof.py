"""The proof of the demo: what the ledger and the table say, against what the generator made."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger.audit import audit
from db.ledger.chunk import OPENING, chunk
from db.ledger.verdict import Verdict, verdict
from db.models.hero import Hero
from worker.connection import Sessions
from worker.demo_data import Expected
from worker.reports import JobReport


class Check(NamedTuple):
    """One thing that was found, and what it must be."""

    what: str
    found: Any
    wanted: Any

    @property
    def holds(self) -> bool:
        return bool(self.found == self.wanted)


async def prove(
    sessions: Sessions, report: JobReport, rows: int, expected: Expected
) -> list[Check]:
    """Compare the end of the import with what its file was made to give."""
    counts = report.tally.counts
    inserted, rejected = (counts.get(one, 0) for one in (Verdict.INSERTED, Verdict.REJECTED))
    async with sessions() as session:
        by_reason = await _rejects_by_reason(session, report.id)
        there, ages_sum = await _heroes(session)
        audited = await _audited(session, report.id)
        claims = await _claims(session, report.id)
    return [
        Check("the job", report.state, "succeeded"),
        Check("workers whose chunks were committed", claims, 2),
        Check("rows read of those in the file", report.tally.rows, rows),
        Check("rows with a verdict", report.counted, rows),
        Check("rows inserted, as the verdicts say", inserted, expected.inserted),
        Check("rows rejected, as the verdicts say", rejected, expected.rejected.total()),
        *(
            Check(f"rejected: {code} {column or ''}", by_reason[code, column], count)
            for (code, column), count in expected.rejected.items()
        ),
        Check("rejects of another kind", (by_reason - expected.rejected).total(), 0),
        Check("SELECT count(*) FROM hero", there, expected.inserted),
        Check("SELECT sum(age) FROM hero", ages_sum, expected.ages_sum),
        Check("rows in the audit", audited, expected.inserted),
    ]


def plain(value: Any) -> str:
    """A figure with separators, anything else as it is."""
    return f"{value:,}" if isinstance(value, int) else str(value)


async def _rejects_by_reason(
    session: AsyncSession, job_id: UUID
) -> Counter[tuple[str, str | None]]:
    query = (
        sa.select(verdict.c.code, verdict.c.column, sa.func.count())
        .where(verdict.c.job_id == job_id, verdict.c.verdict == Verdict.REJECTED)
        .group_by(verdict.c.code, verdict.c.column)
    )
    found: Counter[tuple[str, str | None]] = Counter()
    for code, column, count in await session.execute(query):
        found[code, column] = count
    return found


async def _heroes(session: AsyncSession) -> tuple[int, int]:
    table = sa.inspect(Hero).local_table
    query = sa.select(sa.func.count(), sa.func.sum(table.c.age)).select_from(table)
    count, ages_sum = (await session.execute(query)).one()
    return count, ages_sum


async def _audited(session: AsyncSession, job_id: UUID) -> int:
    query = sa.select(sa.func.sum(audit.c.rows)).where(audit.c.job_id == job_id)
    return int(await session.scalar(query) or 0)


async def _claims(session: AsyncSession, job_id: UUID) -> int:
    query = sa.select(sa.func.count(chunk.c.claim_id.distinct())).where(
        chunk.c.job_id == job_id, chunk.c.chunk_no > OPENING
    )
    return await session.scalar(query) or 0


async def audited_rows(session: AsyncSession, entry: Mapping[str, Any]) -> int:
    """How many rows the table of heroes has in the key ranges of an audit entry."""
    table = sa.inspect(Hero).local_table
    ranges = [table.c.id.between(first, last) for first, last in entry["keys"]["ranges"]]
    query = sa.select(sa.func.count()).select_from(table).where(sa.or_(*ranges))
    return await session.scalar(query) or 0
