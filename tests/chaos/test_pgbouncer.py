"""Worker processes behind a real PgBouncer, with fewer connections to PostgreSQL than they use."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from jobs import Producer, discover_jobs
from jobs._spooling import enqueue_file
from jobs.transfer_heroes import TransferHeroes
from tests.pgbouncer import PgBouncer, pgbouncer
from tests.sample_jobs.write_notes import WriteNotes
from tests.stage import SAMPLE_JOBS, Stage
from tests.workers import Start, WorkerProcess, environment, until

ROWS = 20_000
TRANSFERS = 1_000
HEROES = f"""
    INSERT INTO hero (name, external_id)
        SELECT 'Hero ' || n, 'T' || n FROM generate_series(1, {TRANSFERS}) AS n
"""
QUICK = {
    "pgbouncer": "true",
    "job_modules": ",".join(SAMPLE_JOBS),
    "beat_interval_s": "0.3",
    "lost_after_s": "5",
    "relay_interval_s": "0.1",
    "shutdown_grace_s": "0.2",
    "log_format": "json",
}


@pytest.fixture
def bouncer(database_url: str) -> Iterator[PgBouncer]:
    with pgbouncer(database_url, pool_size=5) as bouncer:
        yield bouncer


@pytest.fixture
def crew(bouncer: PgBouncer, redis_url: str, start: Start) -> list[WorkerProcess]:
    env = environment(bouncer.url, redis_url, **QUICK)
    return [start(env) for _ in range(3)]


@pytest.fixture
def producer(sessions: async_sessionmaker[AsyncSession]) -> Producer:
    """Leaves the ringing to the relay."""
    return Producer(sessions, discover_jobs(SAMPLE_JOBS))


async def test_every_effect_is_committed_once_through_a_killed_worker_and_a_killed_pgbouncer(
    bouncer: PgBouncer, crew: list[WorkerProcess], producer: Producer, stage: Stage, tmp_path: Path
) -> None:
    await stage.value("INSERT INTO team (name) VALUES ('Red')")
    await stage.value(HEROES)
    path = tmp_path / "heroes.csv"
    path.write_text("name,external_id\n" + "".join(f"Hero,I{n}\n" for n in range(ROWS)))
    terms = {"table": "hero", "chunk_rows": 500}
    imported = (await enqueue_file(producer, path, terms)).job_id
    team_id = await stage.value("SELECT id FROM team")
    await producer.enqueue_many(
        [
            TransferHeroes(hero_ids=[n + 1], to_team_id=team_id, from_anywhere=True)
            for n in range(TRANSFERS)
        ]
    )

    async def under_way() -> bool:
        return bool(
            await stage.value("SELECT count(*) > 3 FROM bulwark.chunk WHERE chunk_no > 0")
            and await stage.value("SELECT count(*) FROM transfer")
        )

    await until(under_way, "chunks and transfers are committed")
    holder = await stage.value(
        "SELECT pid FROM bulwark.worker WHERE id = "
        "(SELECT worker_id FROM bulwark.job WHERE id = $1)",
        imported,
    )
    next(one for one in crew if one.pid == holder).kill()
    bouncer.kill()
    bouncer.start()

    async def all_done() -> bool:
        return not await stage.value(
            "SELECT count(*) FROM bulwark.job WHERE state IN ('queued', 'running')"
        )

    await until(all_done, "all jobs have ended")
    assert not await stage.value("SELECT count(*) FROM bulwark.job WHERE state <> 'succeeded'")
    assert await stage.value("SELECT count(*) FROM hero WHERE external_id LIKE 'I%'") == ROWS
    assert await stage.value("SELECT count(*) FROM transfer") == TRANSFERS


async def test_what_a_paused_worker_holds_is_freed_and_no_other_transaction_is_ended(
    crew: list[WorkerProcess], producer: Producer, stage: Stage
) -> None:
    await stage.close_gate()
    job_id = (await producer.enqueue(WriteNotes(chunks=2, gate_in=1))).job_id
    await stage.somebody_at_gate()
    holder = await stage.value(
        "SELECT pid FROM bulwark.worker WHERE id = "
        "(SELECT worker_id FROM bulwark.job WHERE id = $1)",
        job_id,
    )
    paused = next(one for one in crew if one.pid == holder)
    paused.signal(signal.SIGSTOP)

    async def taken_over() -> bool:
        return bool(
            await stage.value(
                "SELECT w.pid <> $2 FROM bulwark.job AS j JOIN bulwark.worker AS w "
                "ON w.id = j.worker_id WHERE j.id = $1 AND j.state = 'running'",
                job_id,
                holder,
            )
        )

    await until(taken_over, "another worker runs the job")
    await stage.somebody_at_gate()
    await stage.open_gate()
    row = await stage.becomes(job_id, "succeeded")
    assert (row["crashes"], row["attempt"]) == (1, 0)
    assert await stage.notes() == ["chunk 1", "chunk 2"]
    others = [event["event"] for one in crew if one is not paused for event in one.events()]
    assert "transaction.replayed" not in others
