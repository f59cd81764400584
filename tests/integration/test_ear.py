"""What a worker hears: what is due, from all its queues, once, and without asking all the time."""

import asyncio
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
from arq.connections import ArqRedis
from arq.utils import timestamp_ms
from redis.exceptions import ReadOnlyError, WatchError
from structlog.testing import capture_logs

from db.ledger.job import PRIORITY_LIMIT, Ring
from jobs._bell import Bell, arq_id, queue_key, wake_key
from tests.arq_side import POLL_INTERVAL_S, hearing, running
from tests.own_servers import OwnRedis
from tests.workers import until
from worker import outage
from worker.arq_worker import ArqWorker
from worker.ear import LEASE_MS, Ear
from worker.message import Message
from worker.redis_pool import make_redis


@pytest.fixture
async def ear(redis_url: str) -> AsyncIterator[Ear]:
    async with hearing(redis_url) as ear:
        yield ear


@pytest.fixture
async def other(redis_url: str) -> AsyncIterator[Ear]:
    async with hearing(redis_url) as ear:
        yield ear


def rings(number: int, queue: str = "default", priority: int = 0) -> list[Ring]:
    return [Ring(uuid4(), 1, "act_out", queue, priority) for _ in range(number)]


def ids(of: list[Ring]) -> set[bytes]:
    return {arq_id(ring.job_id, ring.number).encode() for ring in of}


async def wake_ups(client: ArqRedis) -> int:
    return len(await client.lrange(wake_key("default"), 0, -1))  # type: ignore[misc]  # redis-py types it as sync too


async def keys(client: ArqRedis) -> set[bytes]:
    return {key async for key in client.scan_iter()}


async def test_a_ring_that_was_heard_leaves_nothing_in_redis(client: ArqRedis, ear: Ear) -> None:
    rung = rings(3)
    await Bell(client).ring(rung)
    heard = await ear.claim(10)
    assert {one.arq_id for one in heard} == ids(rung)
    assert all(one.is_ring and one.queue == "default" for one in heard)
    assert await keys(client) == set()


async def test_no_more_is_taken_than_there_are_free_slots(
    client: ArqRedis, ear: Ear, other: Ear
) -> None:
    rung = rings(5)
    await Bell(client).ring(rung)
    first, second = await ear.claim(3), await other.claim(10)
    assert (len(first), len(second)) == (3, 2)
    assert {one.arq_id for one in first + second} == ids(rung)


async def test_a_higher_priority_is_heard_first(client: ArqRedis, ear: Ear) -> None:
    low, high = rings(1, priority=-1), rings(1, priority=3)
    await Bell(client).ring(low + high)
    assert {one.arq_id for one in await ear.claim(1)} == ids(high)


async def test_a_full_queue_does_not_drown_the_other(client: ArqRedis, ear: Ear) -> None:
    await Bell(client).ring(rings(50) + rings(2, "bulk"))
    heard = await ear.claim(4)
    assert sorted(one.queue for one in heard) == ["bulk", "bulk", "default", "default"]


async def test_with_one_free_slot_the_queues_take_turns(client: ArqRedis, ear: Ear) -> None:
    await Bell(client).ring(rings(50) + rings(2, "bulk"))
    heard = [one.queue for _ in range(4) for one in await ear.claim(1)]
    assert sorted(heard) == ["bulk", "bulk", "default", "default"]


async def test_what_is_not_due_yet_is_not_heard(client: ArqRedis, ear: Ear) -> None:
    await client.enqueue_job("act_out", {}, _defer_by=3600)
    assert await ear.claim(10) == []


async def test_what_many_others_have_in_progress_stands_in_nobodys_way(
    client: ArqRedis, ear: Ear
) -> None:
    for number in range(350):
        await client.zadd(queue_key("default"), {f"busy {number}": 1 + number})
        await client.set(f"arq:in-progress:busy {number}", b"1")
    await client.enqueue_job("act_out", {}, _job_id="free")
    assert [one.arq_id for one in await ear.claim(10)] == [b"free"]


async def test_a_message_of_a_plain_client_stays_and_is_leased_to_whoever_heard_it(
    client: ArqRedis, ear: Ear, other: Ear
) -> None:
    await client.enqueue_job("act_out", {"note": "hello"}, _job_id="mine")
    (heard,) = await ear.claim(10)
    assert (heard.arq_id, heard.is_ring) == (b"mine", False)
    assert heard.content == await client.get("arq:job:mine")
    assert await other.claim(10) == []
    assert await client.zscore(queue_key("default"), "mine") is not None
    assert 0 < await client.pttl("arq:in-progress:mine") <= LEASE_MS
    await client.delete("arq:in-progress:mine")
    assert await other.claim(10) == [heard]
    await other.remove(heard)
    assert await keys(client) == set()


@pytest.mark.parametrize("priority", [-PRIORITY_LIMIT, 0, PRIORITY_LIMIT])
async def test_a_ring_of_any_priority_is_known_as_one(
    client: ArqRedis, ear: Ear, priority: int
) -> None:
    await Bell(client).ring(rings(1, priority=priority))
    assert [one.is_ring for one in await ear.claim(1)] == [True]


@pytest.mark.parametrize("arguments", [[{"note": "x"}], [{}], []])
async def test_a_plain_message_under_an_id_like_ours_is_not_taken_for_a_ring(
    client: ArqRedis, ear: Ear, arguments: list[dict[str, str]]
) -> None:
    await client.enqueue_job("act_out", *arguments, _job_id=f"{uuid4()}:1")
    (heard,) = await ear.claim(10)
    assert not heard.is_ring
    assert await client.zcard(queue_key("default")) == 1


async def test_a_bell_wakes_who_waits_at_once(client: ArqRedis, redis_url: str) -> None:
    async def somebody_waits() -> bool:
        clients = await client.info("clients")
        return bool(clients["blocked_clients"])

    async with hearing(redis_url, poll_interval_s=90.0) as ear, asyncio.timeout(30.0):
        waiting = asyncio.create_task(ear.wait())
        await until(somebody_waits, "the ear waits")
        await Bell(client).ring(rings(1, "bulk"))
        await waiting


async def test_without_a_bell_the_wait_ends_when_it_is_time_to_look(ear: Ear) -> None:
    async with asyncio.timeout(5.0):
        await ear.wait()


async def test_who_leaves_something_behind_wakes_the_next_and_the_last_leaves_quiet(
    client: ArqRedis, ear: Ear
) -> None:
    await Bell(client).ring(rings(3))
    assert await wake_ups(client) == 1
    await client.delete(wake_key("default"))
    await ear.claim(2)
    assert await wake_ups(client) == 1
    await ear.claim(2)
    assert await client.exists(wake_key("default")) == 0


async def test_wake_ups_do_not_pile_up(client: ArqRedis) -> None:
    for _ in range(20):
        await Bell(client).ring(rings(1))
    assert await wake_ups(client) == 1
    assert await client.pttl(wake_key("default")) > 0


async def test_a_queue_of_a_wrong_type_stops_no_other_and_is_told_once(
    client: ArqRedis, ear: Ear
) -> None:
    await client.set(queue_key("bulk"), b"a string")
    with capture_logs() as logs:
        for _ in range(2):
            rung = rings(1)
            await Bell(client).ring(rung)
            assert {one.arq_id for one in await ear.claim(10)} == ids(rung)
        await client.delete(queue_key("bulk"))
        later = rings(1, "bulk")
        await Bell(client).ring(later)
        assert {one.arq_id for one in await ear.claim(10)} == ids(later)
    assert [(line["event"], line["queue"]) for line in logs] == [
        ("queue.unreadable", "bulk"),
        ("queue.readable", "bulk"),
    ]
    assert "WRONGTYPE" in logs[0]["reason"]


@pytest.mark.parametrize("left", [0, 1])
async def test_a_wake_up_list_of_a_wrong_type_is_made_anew(
    client: ArqRedis, ear: Ear, left: int
) -> None:
    await Bell(client).ring(rings(1 + left))
    await client.set(wake_key("default"), b"a string")
    assert len(await ear.claim(1)) == 1
    assert await wake_ups(client) == left
    async with asyncio.timeout(5.0):
        await ear.wait()


async def test_a_stock_worker_that_is_about_to_take_a_ring_notices_that_it_was_heard(
    client: ArqRedis, ear: Ear
) -> None:
    """arq watches the in-progress key of what it takes."""
    rung = rings(1)
    await Bell(client).ring(rung)
    (name,) = ids(rung)
    async with client.pipeline(transaction=True) as pipe:
        await pipe.watch(b"arq:in-progress:" + name)
        await ear.claim(1)
        pipe.multi()  # type: ignore[no-untyped-call]  # no types there in redis-py
        pipe.set("stock worker took it", timestamp_ms())
        with pytest.raises(WatchError):
            await pipe.execute()


async def test_an_ear_to_which_redis_only_answers_errors_leaves_the_connections_of_others_alone(
    valkey: OwnRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a replica does after a fail-over; the relay shares the worker's other client."""
    monkeypatch.setattr(outage, "MOST_WAIT_S", 0)
    shared, waiting = (make_redis(valkey.url, 5.0) for _ in range(2))
    ear = Ear(shared, waiting, ["default"], POLL_INTERVAL_S)
    worker = ArqWorker(ear, unheard, ["act_out"], redis_pool=shared, max_jobs=1)

    async def errors() -> int:
        return int((await shared.info("errorstats"))["errorstat_READONLY"]["count"])

    await shared.replicaof("127.0.0.1", "1")
    async with running(worker):
        for _ in range(300):
            answers = await asyncio.gather(
                *(shared.set("mark", b"1") for _ in range(5)), return_exceptions=True
            )
            assert {type(answer) for answer in answers} == {ReadOnlyError}
        assert await errors() > 1510, "the worker has not tried"


async def test_a_worker_that_may_not_claim_leaves_rings_to_others(
    client: ArqRedis, ear: Ear, redis_url: str
) -> None:
    asked: list[bool] = []
    heard: list[bytes] = []
    allowed = asyncio.Event()

    def may_claim() -> bool:
        asked.append(allowed.is_set())
        return allowed.is_set()

    async def hear(message: Message) -> None:
        heard.append(message.arq_id)

    async def is_asked_again() -> bool:
        return len(asked) > 2

    async def is_heard() -> bool:
        return bool(heard)

    pool = make_redis(redis_url, 5.0)
    worker = ArqWorker(ear, hear, ["act_out"], may_claim, redis_pool=pool, max_jobs=1)
    rung = rings(1)
    await Bell(client).ring(rung)
    async with running(worker):
        await until(is_asked_again, "the worker looks whether it may claim")
        assert await client.zcard(queue_key("default")) == 1
        allowed.set()
        await until(is_heard, "the worker claims")
    assert set(heard) == ids(rung)


async def unheard(message: Message) -> None:
    raise AssertionError(f"{message} was heard")
