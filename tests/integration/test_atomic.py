"""Imports that commit everything at their end, or nothing."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa

from jobs.insert_rows import InsertRows
from tests.inprocess import Bench
from tests.stage import connected
from tests.workers import until
from worker.reports import JobReport, read_job

Rows = list[dict[str, Any]]


async def run(bench: Bench, rows: Rows, **options: Any) -> tuple[Mapping[str, int], UUID]:
    job_id = await bench.run(InsertRows(table="hero", rows=rows, atomic=True, **options))
    done = await bench.job(job_id)
    assert done.state == "succeeded", done.error
    return await bench.counts(job_id), job_id


async def rows_of(bench: Bench, sql: str) -> Sequence[sa.Row[*tuple[Any, ...]]]:
    async with bench.sessions() as session:
        return (await session.execute(sa.text(sql))).all()


async def test_an_atomic_import_is_in_one_transaction(bench: Bench) -> None:
    rows: Rows = [{"external_id": str(n), "name": f"Hero {n}"} for n in range(50)]
    counts, _ = await run(bench, rows, chunk_rows=7)
    assert counts == {"inserted": 50}
    [[transactions]] = await rows_of(bench, "SELECT count(DISTINCT xid) FROM bulwark.audit")
    assert transactions == 1


async def test_an_atomic_import_with_a_reject_inserts_nothing_and_says_why(bench: Bench) -> None:
    rows: Rows = [{"external_id": str(n), "name": f"Hero {n}"} for n in range(50)]
    rows[20]["age"] = -1
    job_id = await bench.run(InsertRows(table="hero", rows=rows, atomic=True, chunk_rows=7))
    done = await bench.job(job_id)
    assert (done.state, done.reason) == ("failed", "rejected")
    assert await bench.counts(job_id) == {"rejected": 1, "not_reached": 49}
    assert [(row.row_no, row.code) for row in await bench.verdicts(job_id)] == [(21, "invalid")]
    assert await rows_of(bench, "SELECT id FROM hero") == []
    assert await bench.audit(job_id) == []


async def test_an_atomic_import_may_be_allowed_some_rejects(bench: Bench) -> None:
    rows: Rows = [{"external_id": str(n % 40), "name": f"Hero {n}"} for n in range(50)]
    counts, job_id = await run(bench, rows, chunk_rows=7, max_rejects=10)
    assert counts == {"inserted": 40, "rejected": 10}
    assert {row.chunk_no for row in await bench.verdicts(job_id)} == {6, 7, 8}


async def test_others_see_how_far_it_says_it_is_until_it_is_committed(
    bench: Bench, database_url: str
) -> None:
    rows: Rows = [{"external_id": str(n), "name": f"Hero {n}"} for n in range(3000)]
    payload = InsertRows(table="hero", rows=rows, atomic=True, chunk_rows=5)
    job_id = (await bench.producer.enqueue(payload)).job_id

    async def report() -> JobReport:
        async with bench.sessions() as session:
            return await read_job(session, job_id, 15.0)

    async def told() -> JobReport | None:
        seen = await report()
        return seen if seen.uncommitted_rows else None

    async with connected(database_url) as obstacle:
        held = obstacle.transaction()
        await held.start()
        await obstacle.execute("INSERT INTO hero (name, external_id) VALUES ('Other', '2999')")
        running = asyncio.create_task(bench.deliver(job_id))
        seen = await until(told, "the import tells how far it is")
        assert seen.tally.rows == 0
        assert 0 < (seen.uncommitted_rows or 0) < len(rows)
        await held.rollback()
        await running
    done = await report()
    assert (done.state, done.tally.counts) == ("succeeded", {"inserted": len(rows)})
    assert done.uncommitted_rows is None
    assert await rows_of(bench, "SELECT 1 FROM bulwark.progress") == []


async def test_an_interrupted_one_has_left_nothing_and_starts_again(bench: Bench) -> None:
    rows: Rows = [{"external_id": str(n), "name": f"Hero {n}"} for n in range(2000)]
    payload = InsertRows(table="hero", rows=rows, atomic=True, chunk_rows=5)
    job_id = (await bench.producer.enqueue(payload)).job_id
    executor = await bench.register()
    running = asyncio.create_task(executor.deliver(job_id))

    async def under_way() -> bool:
        return bool(await rows_of(bench, "SELECT 1 FROM bulwark.chunk WHERE chunk_no = 0"))

    await until(under_way, "the import has begun")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await rows_of(bench, "SELECT 1 FROM hero") == []
    assert (await bench.job(job_id)).state == "queued"
    await bench.deliver(job_id)
    assert await bench.counts(job_id) == {"inserted": len(rows)}
