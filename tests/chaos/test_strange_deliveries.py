"""Messages that come twice, out of order, a day late and in two queues: each job is done once."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import pytest
from arq.connections import ArqRedis
from arq.constants import job_key_prefix
from arq.jobs import serialize_job
from arq.utils import timestamp_ms

from jobs._bell import EXPIRES_MS, arq_id, queue_key, score_ms, serialize
from tests.chaos.conftest import Provoked
from tests.every_kind import Field, Task, every_task, transfer_batch
from tests.invariants import Losses
from tests.workers import Start, environment, until

QUEUES = ("default", "other")
TIMES = 3
DAY_MS = 24 * 3600 * 1000
QUICK = {"relay_interval_s": "0.1", "max_jobs": "5"}
Ringing = tuple[UUID, str, int, str, int]
"""A job and its kind, the number of the ring, the queue, and how late it comes."""


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> dict[str, str]:
    return environment(database_url, redis_url, archive_folders=str(tmp_path), **QUICK)


@asynccontextmanager
async def crew(start: Start, settings: dict[str, str]) -> AsyncIterator[None]:
    """For each queue a worker, while the block lasts; both end well."""
    workers = [start({**settings, "BULWARK_QUEUES": queue}) for queue in QUEUES]
    yield
    for one in workers:
        assert await asyncio.to_thread(one.terminate) == 0


async def ring(client: ArqRedis, ringings: Sequence[Ringing]) -> None:
    """Put rings into Redis as the bell does, one by one and in this order."""
    for job_id, kind, number, queue, late_ms in ringings:
        rung_ms = timestamp_ms() - late_ms
        name = arq_id(job_id, number)
        message = serialize_job(kind, (), {}, None, rung_ms, serializer=serialize)
        await client.psetex(job_key_prefix + name, EXPIRES_MS, message)
        await client.zadd(queue_key(queue), {name: score_ms(rung_ms, 0)})


async def all_heard(client: ArqRedis) -> None:
    async def are_empty() -> bool:
        left: list[int] = [await client.zcard(queue_key(queue)) for queue in QUEUES]
        return sum(left) == 0

    await until(are_empty, "the queues in Redis are empty")


async def rings_of(field: Field, tasks: Sequence[Task], chance: random.Random) -> list[Ringing]:
    """Accept the jobs of the tasks; rings of each, with several numbers and in both queues."""
    rings: list[Ringing] = []
    for task in tasks:
        for job_id in await field.accept(task):
            kind = (await field.stage.row(job_id))["kind"]
            for number in range(1, TIMES + 1):
                rings += [(job_id, kind, number, one, chance.randint(0, DAY_MS)) for one in QUEUES]
    chance.shuffle(rings)
    return rings


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.chaos)])
async def test_rings_that_come_again_and_again_in_any_order_and_queue_run_each_job_once(
    field: Field,
    client: ArqRedis,
    start: Start,
    settings: dict[str, str],
    tmp_path: Path,
    provoked: Provoked,
    seed: int,
) -> None:
    tasks, chance = every_task(tmp_path), random.Random(seed)
    await field.seed(tasks)
    rings = await rings_of(field, tasks, chance)
    await ring(client, rings)
    times = 2 * len(rings)
    async with crew(start, settings):
        while sum([await field.left(task) for task in tasks]) > 0:
            some = chance.sample(rings, 10)
            await ring(client, some)
            times += len(some)
            await all_heard(client)
        await all_heard(client)
        before = await field.everything()
        await ring(client, [(*one[:4], DAY_MS) for one in rings])
        await all_heard(client)
    assert await field.everything() == before

    for task in tasks:
        await field.check(task)
        assert (await field.crashes(task)).keys() == {0}
    say(provoked, times, field, await field.is_left_in_order())


async def test_messages_of_a_plain_client_that_come_twice_late_and_in_two_queues_make_one_job_each(
    field: Field,
    client: ArqRedis,
    start: Start,
    settings: dict[str, str],
    tmp_path: Path,
    provoked: Provoked,
) -> None:
    task = transfer_batch(1000, tmp_path)
    await field.seed([task])
    messages: dict[str, bytes] = {}
    for at, payload in enumerate(task.payloads):
        order = payload.model_dump(mode="json")
        await client.enqueue_job("transfer_heroes", order, _job_id=f"order {at}")
        messages[f"order {at}"] = await client.get(f"{job_key_prefix}order {at}")
    await put(client, messages, late_ms=0)
    async with crew(start, settings):
        await all_heard(client)
        await put(client, messages, late_ms=DAY_MS)
        await all_heard(client)
        rows = await field.stage.rows("SELECT id, arq_id FROM bulwark.job ORDER BY id")
        field.jobs[task.name] = [job_id for job_id, _ in rows]

        async def done() -> bool:
            return await field.left(task) == 0

        await until(done, "all orders are carried out")
    assert sorted(name for _, name in rows) == sorted(messages)
    assert await field.stage.rows("SELECT reason FROM bulwark.parked WHERE reason <> 'gone'") == []
    await field.check(task)
    say(provoked, 3 * len(messages), field, await field.is_left_in_order())


async def put(client: ArqRedis, messages: dict[str, bytes], late_ms: int) -> None:
    """Put messages into both queues, the last first."""
    for name in reversed(messages):
        await client.psetex(job_key_prefix + name, EXPIRES_MS, messages[name])
        for queue in QUEUES:
            await client.zadd(queue_key(queue), {name: timestamp_ms() - late_ms})


def say(provoked: Provoked, times: int, field: Field, losses: Losses) -> None:
    provoked(
        "messages twice, out of order, late, in two queues",
        times=times,
        jobs=sum(map(len, field.jobs.values())),
        lost=losses.lost,
        doubled=losses.doubled,
    )
