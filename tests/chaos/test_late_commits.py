"""Jobs that are committed after others of higher ids were rung are rung and run all the same."""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from uuid import UUID

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from jobs._discovery import discover_jobs
from jobs._producer import Producer, new_job_id
from tests.chaos.conftest import Provoked
from tests.invariants import check_invariants
from tests.sample_jobs.act_out import ActOut
from tests.sample_jobs.take_down import TakeDown
from tests.stage import SAMPLE_JOBS, Stage
from tests.workers import Start, environment, let_redis_be_known, until

Sessions = async_sessionmaker[AsyncSession]
ROUNDS = 12
"""Fewer than the engine of a test has connections."""
AT_A_TIME = 3
"""So many are committed before their ends are awaited."""
QUICK = {"job_modules": ",".join(SAMPLE_JOBS), "relay_interval_s": "0.1"}


@pytest.fixture
def producer(sessions: Sessions) -> Producer:
    """Without a bell, so that it is the relay that rings."""
    return Producer(sessions, discover_jobs(SAMPLE_JOBS))


@pytest.fixture
async def crew(start: Start, database_url: str, redis_url: str) -> None:
    env = environment(database_url, redis_url, **QUICK)
    await let_redis_be_known(env, start)
    for _ in range(2):
        start(env)


@pytest.mark.usefixtures("crew")
async def test_a_lower_id_that_is_committed_after_a_higher_one_was_rung_is_rung_and_run(
    stage: Stage, sessions: Sessions, producer: Producer, provoked: Provoked, database_url: str
) -> None:
    async with sessions() as session:
        low = (await producer.enqueue(ActOut(note="low"), session=session)).job_id
        high = (await producer.enqueue(ActOut(note="high"))).job_id
        assert low < high
        rung = await stage.becomes(high, "succeeded")
        assert rung["ring"] > 0
        assert await stage.row(low) == {}
        await session.commit()
    assert (await stage.becomes(low, "succeeded"))["ring"] == 1
    await say(provoked, database_url, 1, ["high", "low"], await stage.notes())
    assert await stage.notes() == ["high", "low"]


@pytest.mark.usefixtures("crew")
@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in batches"])
async def test_jobs_that_are_committed_in_any_order_of_their_ids_are_all_run_once(
    stage: Stage,
    sessions: Sessions,
    producer: Producer,
    provoked: Provoked,
    database_url: str,
    together: bool,
) -> None:
    chance = random.Random(9)
    ids = [new_job_id() for _ in range(ROUNDS)]
    order = chance.sample(range(ROUNDS), ROUNDS)
    async with AsyncExitStack() as stack:
        begun: list[AsyncSession] = []
        for at, job_id in enumerate(ids):
            session = await stack.enter_async_context(sessions())
            payload = TakeDown(note=f"{at}") if together else ActOut(note=f"{at}")
            await producer.enqueue(payload, session=session, job_id=job_id)
            begun.append(session)
        for number, at in enumerate(order, 1):
            await begun[at].commit()
            if number % AT_A_TIME == 0:
                await all_done(stage, [ids[one] for one in order[:number]])
    await say(provoked, database_url, late(order), map(str, range(ROUNDS)), await stage.notes())


def late(order: Sequence[int]) -> int:
    """How many come behind a higher one that is known to have run: not of those before them."""
    ran = [order[: at - at % AT_A_TIME] for at in range(len(order))]
    return sum(one < max(before, default=-1) for one, before in zip(order, ran, strict=True))


async def all_done(stage: Stage, ids: Sequence[UUID]) -> None:
    async def done() -> bool:
        sql = "SELECT count(*) FROM bulwark.job WHERE id = ANY ($1) AND state = 'succeeded'"
        return bool(await stage.value(sql, ids) == len(ids))

    await until(done, f"{len(ids)} jobs that are committed are done")


async def say(
    provoked: Provoked, database_url: str, times: int, wanted: Iterable[str], notes: Sequence[str]
) -> None:
    """Compare the notes that are there with those that the jobs were to leave, one each."""
    losses = await check_invariants(database_url)
    jobs, found = Counter(wanted), Counter(notes)
    provoked(
        "a lower id committed after a higher one was rung",
        times=times,
        jobs=jobs.total(),
        lost=(jobs - found).total() + losses.lost,
        doubled=(found - jobs).total() + losses.doubled,
    )
    assert losses.violations == []
