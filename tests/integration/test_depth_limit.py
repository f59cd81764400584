"""A queue that is deep enough takes no more jobs, and says so."""

import asyncio
import json
from pathlib import Path
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from db.engine import make_sessions
from db.ledger import depth
from jobs._discovery import discover_jobs
from jobs._errors import QueueFull
from jobs._producer import Producer
from tests.command_line import Cli, make_cli, sentence
from tests.proxy import Cut, proxied
from tests.sample_jobs.act_out import ActOut
from tests.stage import SAMPLE_JOBS, Stage

MOST = 3
END_ONE = sa.text(
    "UPDATE bulwark.job SET state = 'cancelled' "
    "WHERE id = (SELECT id FROM bulwark.job WHERE state = 'queued' LIMIT 1)"
)


@pytest.fixture
async def producer(sessions: async_sessionmaker[AsyncSession]) -> Producer:
    """Into a queue in which three jobs may wait."""
    async with sessions.begin() as session:
        await depth.set_limit(session, "default", MOST, "Zoë")
    return Producer(sessions, discover_jobs(SAMPLE_JOBS))


@pytest.fixture
def cli(database_url: str, redis_url: str) -> Cli:
    return make_cli(database_url, redis_url)


async def queued(stage: Stage) -> int:
    count: int = await stage.value("SELECT count(*) FROM bulwark.job WHERE state = 'queued'")
    return count


async def test_a_full_queue_takes_no_job_until_one_has_left(
    producer: Producer, stage: Stage
) -> None:
    first, *_ = [await producer.enqueue(ActOut()) for _ in range(MOST)]

    with pytest.raises(QueueFull, match="default holds 3 or more jobs and 3 may wait"):
        await producer.enqueue(ActOut())
    await producer.enqueue(ActOut(), queue="other")
    await stage.value("UPDATE bulwark.job SET state = 'cancelled' WHERE id = $1", first.job_id)
    await producer.enqueue(ActOut())

    assert await queued(stage) == MOST + 1


async def test_producers_beside_a_drain_are_told_the_truth_about_each_job(
    producer: Producer, sessions: async_sessionmaker[AsyncSession], stage: Stage
) -> None:
    """Whether there is room changes all the time: what is accepted is there, all else refused."""
    accepted: list[UUID] = []
    refused = 0

    async def produce() -> None:
        nonlocal refused
        for _ in range(100):
            try:
                accepted.append((await producer.enqueue(ActOut())).job_id)
            except QueueFull:
                refused += 1

    async def drain() -> None:
        while True:
            async with sessions.begin() as session:
                await session.execute(END_ONE)

    draining = asyncio.create_task(drain())
    await asyncio.gather(*(produce() for _ in range(4)))
    draining.cancel()
    await asyncio.gather(draining, return_exceptions=True)

    there = await stage.value("SELECT array_agg(id ORDER BY id) FROM bulwark.job")
    assert sorted(accepted) == there
    assert refused == 400 - len(accepted) > 0


async def test_a_job_whose_answer_was_lost_does_not_fill_the_queue_for_itself(
    producer: Producer, database_url: str, stage: Stage
) -> None:
    await producer.enqueue_many([ActOut()] * (MOST - 1))
    async with proxied(database_url) as (proxy, way):
        engine = create_async_engine(way)
        proxy.arm(Cut.ANSWER)
        last = await Producer(make_sessions(engine), discover_jobs(SAMPLE_JOBS)).enqueue(ActOut())
        await engine.dispose()

    assert proxy.cuts == [Cut.ANSWER]
    assert await stage.value("SELECT state FROM bulwark.job WHERE id = $1", last.job_id) == "queued"
    assert await queued(stage) == MOST


async def test_many_jobs_are_taken_all_or_none(producer: Producer, stage: Stage) -> None:
    with pytest.raises(QueueFull):
        await producer.enqueue_many([ActOut()] * (MOST + 1))
    assert await queued(stage) == 0
    await producer.enqueue_many([ActOut()] * MOST)
    assert await queued(stage) == MOST


async def test_a_job_that_was_accepted_before_is_given_though_the_queue_is_full(
    producer: Producer,
) -> None:
    first = await producer.enqueue(ActOut(), idempotency_key="a")
    await producer.enqueue_many([ActOut()] * (MOST - 1))

    again = await producer.enqueue(ActOut(), idempotency_key="a")
    with pytest.raises(QueueFull):
        await producer.enqueue(ActOut(), idempotency_key="b")

    assert (again.job_id, again.created) == (first.job_id, False)


async def test_a_refused_job_leaves_nothing_in_the_callers_transaction(
    producer: Producer, sessions: async_sessionmaker[AsyncSession], stage: Stage
) -> None:
    await producer.enqueue_many([ActOut()] * MOST)

    async with sessions.begin() as session:
        with pytest.raises(QueueFull):
            await producer.enqueue(ActOut(), session=session, idempotency_key="a")

    assert await queued(stage) == MOST
    assert await stage.value("SELECT count(*) FROM bulwark.idempotency") == 0


async def test_what_the_system_itself_enqueues_is_not_turned_away(
    producer: Producer, sessions: async_sessionmaker[AsyncSession], stage: Stage
) -> None:
    await producer.enqueue_many([ActOut()] * MOST)

    await Producer(sessions, discover_jobs(SAMPLE_JOBS), heeds_depth=False).enqueue(ActOut())

    assert await queued(stage) == MOST + 1


async def test_the_command_line_sets_shows_and_lifts_a_limit(
    cli: Cli, stage: Stage, tmp_path: Path
) -> None:
    file = tmp_path / "teams.csv"
    file.write_text("name\nRed\n")
    set_ = await asyncio.to_thread(cli, "limit", "default", "--most", "1", "--json")
    words = ("import", "team", str(file))
    accepted, refused = [await asyncio.to_thread(cli, *words) for _ in range(2)]
    lifted = await asyncio.to_thread(cli, "limit", "default", "--none")
    at_last = await asyncio.to_thread(cli, *words)

    assert json.loads(set_.stdout) == {"queue": "default", "queued": 0, "most": 1}
    assert (accepted.exit_code, refused.exit_code, at_last.exit_code) == (0, 2, 0)
    assert "bulwark limit" in sentence(refused)
    assert "any number" in lifted.stdout
    assert await stage.value("SELECT count(DISTINCT job_id) FROM bulwark.spool") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--most", "3"), "Name the queue"),
        (("default",), "--most NUMBER or --none"),
        (("no such/queue", "--none"), "not the name of a queue"),
    ],
)
async def test_a_limit_that_is_not_clear_is_refused_in_one_sentence(
    cli: Cli, words: tuple[str, ...], said: str
) -> None:
    result = await asyncio.to_thread(cli, "limit", *words)

    assert result.exit_code == 2
    assert said in sentence(result)
