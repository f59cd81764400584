"""Sealing the audit of a test's database, and verifying it."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import asyncpg

from jobs.insert_rows import InsertRows
from jobs.seal_audit import SealAudit
from jobs.update_rows import UpdateRows
from tests.inprocess import Bench
from tests.workers import until
from worker.audit_verification import Verification, verify

KEY, OTHER_KEY = "k" * 40, "o" * 40


async def change_heroes(bench: Bench, number: int = 6, *, times: int = 1) -> list[UUID]:
    """Make heroes, and change all of them so often: a line of the audit for each change."""
    rows: list[Any] = [
        {"name": f"Hero {n}", "age": 20, "secret_name": f"Secret {n}"} for n in range(number)
    ]
    await bench.run(InsertRows(table="hero", rows=rows))
    changed: list[UUID] = []
    for _ in range(times):
        values: dict[str, Any] = {"age": 30 + len(changed), "secret_name": f"New {len(changed)}"}
        done = await bench.run(UpdateRows(table="hero", filter={"id": {"gt": 0}}, values=values))
        changed.append(done)
    return changed


async def seal_all(bench: Bench, segment_rows: int = 100_000) -> str:
    """Seal until nothing is left, which others' transactions on the server may delay.

    Returns the head.
    """

    async def sealed() -> str | None:
        row: Any = await bench.job(await bench.run(SealAudit(segment_rows=segment_rows)))
        assert row.state == "succeeded", row.error
        found = await verified(bench)
        return None if found.unsealed else found.head

    return await until(sealed, "the whole audit is sealed")


async def verified(
    bench: Bench,
    *,
    keys: Sequence[str] | None = None,
    heads: Mapping[int, str] | None = None,
    job_id: UUID | None = None,
) -> Verification:
    keys = bench.housekeeping.seal_keys if keys is None else keys
    return await verify(bench.sessions, keys, heads or {}, job_id)


Told = tuple[str, int | None, UUID | None, int | None, int | None, int]


def faults(found: Verification) -> list[Told]:
    """Kind, segment, job, chunk, entry and rows of each."""
    return [
        (one.kind.value, one.segment, *(one.key or (None, None, None)), one.rows)
        for one in found.findings.faults
    ]


async def rows_of(connection: asyncpg.Connection, job_id: UUID) -> int:
    """How many lines of the audit a job has."""
    query = "SELECT count(*) FROM bulwark.audit WHERE job_id = $1"
    count: int = await connection.fetchval(query, job_id)
    return count
