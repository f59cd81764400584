"""Whatever stands in Redis, each message is a ring, a job or parked, and a worker goes on."""

import json
import pickle
from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

from arq.connections import ArqRedis
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from jobs._adoption import printable
from jobs._bell import queue_key, wake_key
from tests.arq_side import hearing
from tests.fuzzing import JSON, Tried, fuzzed
from tests.inprocess import Bench
from tests.sample_jobs.act_out import ActOut
from tests.stage import Stage
from worker.delivery import Delivery
from worker.message import Message

QUEUE = queue_key("default")
NOW_MS = 1_700_000_000_000
STEP_MS = 10_000_000_000
WAITING = UUID(int=7)
"""A job that waits."""
UUIDS = st.just(str(WAITING)) | st.uuids().map(str)

kinds = st.sampled_from(
    ["act_out", "insert_rows", "transfer_heroes", "nobody", "", "\\z", "é", "a\\u00e9", "\ud800"]
) | st.text(max_size=10)
arguments: st.SearchStrategy[Any] = st.just([]) | st.lists(JSON, max_size=2) | JSON
calls = st.fixed_dictionaries(
    {},
    optional={
        "f": kinds | JSON,
        "a": arguments,
        "k": st.just({}) | st.dictionaries(st.text(max_size=5), JSON, max_size=3) | JSON,
        "et": st.just(NOW_MS) | st.integers(-1, 2**80) | JSON,
        "t": st.none() | JSON,
        "x": JSON,
    },
).map(lambda call: b"\x01" + json.dumps(call, separators=(",", ":")).encode())


def _ring(kind: str, et: str) -> bytes:
    text = f'{{"t":null,"f":"{kind}","a":[],"k":{{}},"et":{et}}}'
    return b"\x01" + text.encode(errors="surrogatepass")


def _nested(depth: int, kind: str) -> bytes:
    deep = "[" * depth + "]" * depth
    return f'\x01{{"t":null,"f":"{kind}","a":[],"k":{{"note":{deep}}},"et":1}}'.encode()


def _long_number(digits: int) -> bytes:
    text = f'\x01{{"t":null,"f":"act_out","a":[],"k":{{"seconds":{"9" * digits}}},"et":1}}'
    return text.encode()


rings = st.builds(
    _ring,
    kinds,
    st.sampled_from([str(NOW_MS), "0", "9" * 400, "1e3", "-1"]) | st.integers(0, 2**64).map(str),
)
contents = (
    calls
    | rings
    | st.binary(max_size=60)
    | st.binary(max_size=60).map(lambda data: b"\x01" + data)
    | JSON.map(lambda value: b"\x01" + json.dumps(value).encode())
    | JSON.map(pickle.dumps)
    | st.builds(_nested, st.sampled_from([10, 300, 900, 990, 2_000, 20_000]), st.just("act_out"))
    | st.sampled_from([100, 4_300, 5_000]).map(_long_number)
    | st.builds(lambda data, cut: data[:cut], calls, st.integers(0, 60))
)
arq_ids = (
    st.builds(
        "{}:{}".format, UUIDS, st.integers(0, 10**30) | st.sampled_from(["", "x", "01", "-1"])
    )
    | UUIDS
    | st.text(min_size=1, max_size=10)
    | st.sampled_from(["a" * 501, "nul\0", "cron:x", "\n", "1:1", "😀:1"])
).map(lambda text: text.encode(errors="surrogatepass")) | st.binary(min_size=1, max_size=20)
scores = st.sampled_from(
    [1.0, 0.0, -1e18, float("-inf"), NOW_MS, NOW_MS - STEP_MS, NOW_MS - 10 * STEP_MS, 0.5]
)
other_types = st.sampled_from(["list", "hash", "set", "zset", "stream"])
forged_rings = st.builds(
    lambda job_id, number, kind, steps: (
        f"{job_id}:{number}".encode(),
        _ring(kind, str(NOW_MS)),
        float(NOW_MS - steps * STEP_MS),
    ),
    UUIDS,
    st.integers(0, 10**30),
    kinds,
    st.integers(0, 20),
)
"""Messages that are in all three, id, text and score, what a ring is."""
messages = forged_rings | st.tuples(arq_ids, contents | other_types | st.none(), scores)


async def _put_of_type(redis: Redis, key: bytes | str, kind: str) -> None:
    client: Any = redis  # redis-py types its commands as sync too
    match kind:
        case "list":
            await client.rpush(key, "a", "b")
        case "hash":
            await client.hset(key, "a", "b")
        case "set":
            await client.sadd(key, "a")
        case "zset":
            await client.zadd(key, {"a": 1})
        case "stream":
            await client.xadd(key, {"a": "b"})
        case _:
            await client.set(key, "text")


async def _put(
    redis: Redis, messages: Sequence[tuple[bytes, bytes | str | None, float]]
) -> list[bytes]:
    """Put them into the queue as anybody may; returns their ids, each once."""
    for arq_id, content, score in messages:
        key = b"arq:job:" + arq_id
        await redis.delete(key)
        if isinstance(content, str):
            await _put_of_type(redis, key, content)
        elif content is not None:
            await redis.set(key, content)
        await redis.zadd(QUEUE, {arq_id: score})
    return list({arq_id for arq_id, _, _ in messages})


async def _carry_out_all(bench: Bench, redis_url: str) -> list[Message]:
    """Hear and carry out everything; what is raised is raised here, where a worker would log it."""
    heard = []
    async with hearing(redis_url) as ear:
        executor = await bench.register()
        delivery = Delivery(executor, ear)
        while messages := await ear.claim(10):
            heard.extend(messages)
            for message in messages:
                await delivery.carry_out(message)
        for job_id in executor.unclaimed:  # the relay rings them
            await executor.deliver(job_id)
    return heard


async def _lost(stage: Stage, heard: Sequence[Message]) -> list[Message]:
    """Messages, neither rings nor named as one, of which there is no job nor parked message."""
    known = {
        arq_id
        for (arq_id,) in await stage.rows(
            "SELECT arq_id FROM bulwark.job UNION ALL SELECT arq_id FROM bulwark.parked"
        )
    }
    return [
        one
        for one in heard
        if not one.is_ring
        and not one.arq_id.startswith(str(WAITING).encode())
        and printable(one.arq_id) not in known
    ]


async def _goes_on(bench: Bench, redis: ArqRedis, redis_url: str, stage: Stage) -> None:
    """Prove that a worker does a healthy job of a plain client, and one that waits for a ring."""
    await stage.value("TRUNCATE note")
    await redis.enqueue_job("act_out", {"note": "healthy"}, _job_id=f"healthy {uuid4()}")
    await _carry_out_all(bench, redis_url)
    assert await stage.notes() == ["healthy"]


@fuzzed(120)
@given(messages=st.lists(messages, min_size=1, max_size=4))
async def test_any_message_is_a_ring_a_job_or_parked_and_the_worker_goes_on(
    messages: list[tuple[bytes, bytes | str | None, float]],
    bench: Bench,
    redis: Redis,
    client: ArqRedis,
    redis_url: str,
    stage: Stage,
    tried: Tried,
) -> None:
    tried.inputs += len(messages)
    await redis.flushdb()
    await stage.value("TRUNCATE bulwark.job, bulwark.parked")
    await bench.producer.enqueue(ActOut())
    await stage.value("UPDATE bulwark.job SET id = $1", WAITING)
    ids = await _put(redis, messages)
    heard = await _carry_out_all(bench, redis_url)
    assert {one.arq_id for one in heard} == set(ids)
    assert await _lost(stage, heard) == []
    assert await redis.keys("arq:*") == []
    left = "SELECT count(*) FROM bulwark.job WHERE state IN ('queued', 'running') AND id <> $1"
    assert await stage.value(left, WAITING) == 0
    await _goes_on(bench, client, redis_url, stage)


keys = st.sampled_from(
    [queue_key("bulk"), wake_key("bulk"), wake_key("default"), "arq:in-progress:theirs"]
)


@fuzzed(30)
@given(wrong=st.dictionaries(keys, other_types | st.just("text"), min_size=1))
async def test_a_key_of_ours_of_another_type_stops_no_other_queue(
    wrong: dict[str, str],
    bench: Bench,
    redis: Redis,
    client: ArqRedis,
    redis_url: str,
    stage: Stage,
    tried: Tried,
) -> None:
    tried.one()
    await redis.flushdb()
    for key, kind in wrong.items():
        await _put_of_type(redis, key, kind)
    await _put(redis, [(b"theirs", b"\x01{}", 1.0)])
    await _goes_on(bench, client, redis_url, stage)
