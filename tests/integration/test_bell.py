"""What the bell puts into Redis is what arq reads, one ring per job, and never pickle."""

import json
import pickle
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from arq.jobs import DeserializationError, deserialize_job_raw
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis
from redis.exceptions import RedisError

from db.ledger.job import Ring
from jobs._bell import (
    EXPIRES_MS,
    Bell,
    arq_id,
    deserialize,
    job_id_of,
    queue_key,
    score_ms,
    serialize,
)

DAY_MS = 24 * 3600 * 1000
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


def ring(number: int = 1, job_id: UUID | None = None, queue: str = "default") -> Ring:
    return Ring(job_id or uuid4(), number, "rename_team", queue, 0)


async def keys(redis: Redis) -> set[str]:
    """What there is beside wake-ups."""
    names = {key.decode() async for key in redis.scan_iter()}
    return {name for name in names if not name.startswith("bulwark:wake:")}


async def test_a_ring_is_a_message_that_arq_can_read(redis: Redis) -> None:
    one = ring(3)
    await Bell(redis).ring([one])
    assert await redis.zrange("arq:queue", 0, -1) == [f"{one.job_id}:3".encode()]
    message = await redis.get(f"arq:job:{one.job_id}:3")
    name, args, kwargs, tries, _ = deserialize_job_raw(message, deserializer=deserialize)
    assert name == "rename_team"
    assert not args
    assert not kwargs
    assert not tries


async def test_a_ring_carries_no_more_than_the_id_and_the_kind(redis: Redis) -> None:
    one = ring()
    await Bell(redis).ring([one])
    message = await redis.get(f"arq:job:{one.job_id}:1")
    assert message[:1] == b"\x01"
    assert {k: v for k, v in json.loads(message[1:]).items() if v} == {
        "f": "rename_team",
        "et": json.loads(message[1:])["et"],
    }


async def test_a_ring_outlives_any_wait(redis: Redis) -> None:
    one = ring()
    await Bell(redis).ring([one])
    left_ms = await redis.pttl(f"arq:job:{one.job_id}:1")
    assert 9 * 365 * DAY_MS < left_ms <= EXPIRES_MS


async def test_a_ring_replaces_the_ring_before_with_all_its_keys(redis: Redis) -> None:
    job_id = uuid4()
    bell = Bell(redis)
    await bell.ring([ring(1, job_id)])
    await redis.set(f"arq:in-progress:{job_id}:1", b"1")
    await redis.set(f"arq:retry:{job_id}:1", b"1")
    await bell.ring([ring(2, job_id)])
    assert await redis.zrange("arq:queue", 0, -1) == [f"{job_id}:2".encode()]
    assert await keys(redis) == {"arq:queue", f"arq:job:{job_id}:2"}


async def test_a_ring_leaves_the_rings_of_other_jobs_alone(redis: Redis) -> None:
    other, job_id = ring(), uuid4()
    bell = Bell(redis)
    await bell.ring([other, ring(1, job_id)])
    await bell.ring([ring(2, job_id)])
    assert {f"arq:job:{other.job_id}:1", f"arq:job:{job_id}:2", "arq:queue"} == await keys(redis)


async def test_ringing_the_same_ring_twice_leaves_one(redis: Redis) -> None:
    one = ring()
    await Bell(redis).ring([one])
    await Bell(redis).ring([one])
    assert await redis.zcard("arq:queue") == 1


async def test_no_rings_need_no_redis() -> None:
    async with Redis(port=1) as nowhere:
        await Bell(nowhere).ring([])


async def test_a_redis_that_is_away_is_an_error_of_redis() -> None:
    async with Redis(port=1) as nowhere:
        with pytest.raises(RedisError):
            await Bell(nowhere).ring([ring()])


async def test_each_queue_has_a_sorted_set_of_its_own(redis: Redis) -> None:
    await Bell(redis).ring([ring(), ring(queue="night")])
    assert await redis.zcard("arq:queue") == 1
    assert await redis.zcard("arq:queue:night") == 1
    assert queue_key("night") == "arq:queue:night"


async def test_only_our_own_rings_are_listed_and_the_first_first(redis: Redis) -> None:
    ours = [f"{uuid4()}:{n}" for n in (1, 12)]
    foreign = ["cron:x", f"{uuid4()}", f"{uuid4()}:x", "-" * 36 + ":1", uuid4().hex + "abcd:1"]
    await redis.zadd("arq:queue", {name: n for n, name in enumerate([*foreign, *ours])})
    assert await Bell(redis).oldest("default") == ours
    assert await Bell(redis).oldest("default", most=6) == ours[:1]


async def test_a_silenced_ring_is_gone_with_all_its_keys(redis: Redis) -> None:
    gone, kept = ring(), ring()
    bell = Bell(redis)
    await bell.ring([gone, kept])
    await bell.silence("default", [arq_id(gone.job_id, 1)])
    await bell.silence("default", [])
    assert await keys(redis) == {"arq:queue", f"arq:job:{kept.job_id}:1"}
    assert await bell.oldest("default") == [f"{kept.job_id}:1"]


def test_the_arq_id_tells_the_job() -> None:
    job_id = uuid4()
    assert arq_id(job_id, 7) == f"{job_id}:7"
    assert job_id_of(f"{job_id}:7") == job_id


@pytest.mark.parametrize("foreign", ["hello", "hello:1", ""])
def test_a_foreign_arq_id_is_an_error(foreign: str) -> None:
    with pytest.raises(ValueError, match="UUID"):
        job_id_of(foreign)


@given(st.integers(-9, 8), st.integers(0, 100 * DAY_MS))
def test_a_higher_priority_comes_first_however_long_the_lower_one_has_waited(
    priority: int, waited_ms: int
) -> None:
    now_ms = 1_800_000_000_000
    assert score_ms(now_ms, priority + 1) < score_ms(now_ms - waited_ms, priority)


@given(st.integers(-9, 9))
def test_a_clock_that_is_a_day_ahead_rings_at_once_all_the_same(priority: int) -> None:
    now_ms = 1_800_000_000_000
    assert 0 < score_ms(now_ms + DAY_MS, priority) < now_ms


@given(st.dictionaries(st.text(), json_values))
def test_a_message_comes_back_as_it_went_in(message: dict[str, Any]) -> None:
    assert deserialize(serialize(message)) == message


class Exploit:
    """Unpickling this runs a function of the sender's choice."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize(
    "message",
    [
        pickle.dumps(Exploit()),
        b"\x01" + pickle.dumps({"f": "rename_team"}),
        b"\x02" + b'{"f": "rename_team"}',
        b'{"f": "rename_team"}',
        b"\x01[]",
        b"\x01null",
        b"\x01{",
        b"\x01",
        b"",
    ],
)
def test_a_message_of_another_kind_is_refused(message: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json says it in its own words
        deserialize(message)
    with pytest.raises(DeserializationError):
        deserialize_job_raw(message, deserializer=deserialize)


def test_what_json_cannot_hold_is_not_sent() -> None:
    with pytest.raises(TypeError):
        serialize({"a": {1, 2}})
