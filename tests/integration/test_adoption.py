"""Messages of plain arq clients: made jobs once, or parked with the reason; none is ever lost."""

import json
import pickle
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from arq.connections import ArqRedis
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from structlog.testing import capture_logs

from jobs import Bell, Producer, discover_jobs
from jobs._bell import queue_key, score_ms, serialize
from tests.arq_side import hearing
from tests.inprocess import Bench
from tests.sample_jobs.act_out import ActOut
from tests.stage import Stage
from worker.delivery import Delivery
from worker.message import Message

Sessions = async_sessionmaker[AsyncSession]
QUEUE = queue_key("default")


async def put(client: ArqRedis, content: bytes | None, arq_id: str | bytes = "theirs") -> None:
    """What a client of any make may have left in the queue."""
    name = arq_id.encode() if isinstance(arq_id, str) else arq_id
    if content is not None:
        await client.set(b"arq:job:" + name, content)
    await client.zadd(QUEUE, {name: 1})


@asynccontextmanager
async def heard(bench: Bench, redis_url: str) -> AsyncIterator[tuple[Delivery, list[Message]]]:
    """A delivery, and what its ear has claimed."""
    async with hearing(redis_url) as ear:
        yield Delivery(await bench.register(), ear), await ear.claim(10)


async def carry_out_all(bench: Bench, redis_url: str) -> list[Message]:
    async with heard(bench, redis_url) as (delivery, messages):
        for message in messages:
            await delivery.carry_out(message)
    return messages


async def parked(stage: Stage) -> list[tuple[Any, ...]]:
    rows = await stage._connection.fetch(
        "SELECT arq_id, queue, kind, message, reason FROM bulwark.parked ORDER BY id"
    )
    return [tuple(row.values()) for row in rows]


def call(name: str, *arguments: Any, **keywords: Any) -> bytes:
    return serialize({"t": None, "f": name, "a": arguments, "k": keywords, "et": 1_800_000_000_000})


async def test_an_adopted_message_is_a_job_that_runs_at_once_on_the_terms_of_its_kind(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str
) -> None:
    await put(client, call("act_out", {"note": "hello"}), "their id")
    with capture_logs() as logs:
        await carry_out_all(bench, redis_url)
    row = await stage.row(await stage.value("SELECT id FROM bulwark.job"))
    defaults = bench.jobs["act_out"].defaults
    assert (row["arq_id"], row["queue"], row["state"]) == ("their id", "default", "succeeded")
    assert (row["max_attempts"], row["timeout_s"]) == (defaults.max_attempts, defaults.timeout_s)
    assert await stage.notes() == ["hello"]
    assert await client.keys("*") == []
    assert "message.adopted" in {line["event"] for line in logs}


async def test_a_message_that_is_delivered_twice_makes_one_job(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str
) -> None:
    """A worker that dies after its commit leaves the message in Redis."""
    await put(client, call("act_out", {"note": "once"}))
    (first,) = await carry_out_all(bench, redis_url)
    await put(client, first.content)
    (second,) = await carry_out_all(bench, redis_url)
    assert second == first
    assert await stage.value("SELECT count(*) FROM bulwark.job") == 1
    assert await stage.notes() == ["once"]
    assert await client.keys("*") == []


async def test_a_job_that_was_adopted_and_never_run_is_rung(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str
) -> None:
    await put(client, call("act_out"))
    async with heard(bench, redis_url) as (delivery, (message,)):
        delivery.executor.stop()
        await delivery.carry_out(message)
    wait_s = await stage.value(
        "SELECT extract(epoch FROM next_ring_at - now())::float FROM bulwark.job "
        "WHERE state = 'queued'"
    )
    assert 0 < wait_s <= 10


async def test_a_payload_that_does_not_fit_is_a_job_that_failed_and_says_why(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str
) -> None:
    await put(client, call("act_out", {"nota": "bene"}))
    await carry_out_all(bench, redis_url)
    row = await stage.row(await stage.value("SELECT id FROM bulwark.job"))
    assert (row["state"], row["reason"]) == ("failed", "rejected")
    assert "nota" in row["error"]
    assert await parked(stage) == []


class Exploit:
    """Unpickling this runs a function of the sender's choice."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was loaded",)


DEEP = b'\x01{"f":"act_out","a":[],"et":1,"t":null,"k":' + b'{"note":' * 50_000
PICKLE = pickle.dumps({"f": "act_out", "a": (Exploit(),), "k": {}, "t": None, "et": 1})


@pytest.mark.parametrize(
    ("content", "reason", "kind"),
    [
        (None, "gone", None),
        (PICKLE, "pickle", None),
        (b"\x01" + PICKLE, "unreadable", None),
        (json.dumps({"f": "act_out", "a": [], "k": {}, "et": 1}).encode(), "unreadable", None),
        (b"", "unreadable", None),
        (b"\x01[]", "unreadable", None),
        (b"\x01{}", "unreadable", None),
        (serialize({"f": "act_out", "a": [], "k": {}, "et": "today"}), "unreadable", "act_out"),
        (DEEP, "unreadable", None),
        (call("fly_to_the_moon", {"by": "noon"}), "unknown_job", "fly_to_the_moon"),
        (
            call("a NUL \0 and half a pair \ud800"),
            "unknown_job",
            "a NUL \\x00 and half a pair \\ud800",
        ),
        (call("act_out", {"note": "a"}, {"note": "b"}), "bad_arguments", "act_out"),
        (call("act_out", "hello"), "bad_arguments", "act_out"),
        (call("act_out", {"note": "a"}, note="b"), "bad_arguments", "act_out"),
        (call("act_out", {"note": "x" * 1024 * 1024}), "too_large", "act_out"),
        (call("act_out", {"note": "a NUL \0"}), "unstorable", "act_out"),
        (call("act_out", {"note": "half a pair \ud800"}), "unstorable", "act_out"),
        (call("act_out", {"seconds": float("nan")}), "unstorable", "act_out"),
    ],
)
async def test_a_message_of_which_no_job_can_be_made_is_parked_as_it_came_and_told_once(
    bench: Bench,
    stage: Stage,
    client: ArqRedis,
    redis_url: str,
    content: bytes | None,
    reason: str,
    kind: str | None,
) -> None:
    with capture_logs() as logs:
        for _ in range(2):
            await put(client, content)
            await carry_out_all(bench, redis_url)
    assert await parked(stage) == [("theirs", "default", kind, content, reason)]
    assert await client.keys("*") == []
    assert await stage.value("SELECT count(*) FROM bulwark.job") == 0
    told = [line for line in logs if line["event"] == "message.parked"]
    assert [(line["reason"], line["kind"]) for line in told] == [(reason, kind)]


@pytest.mark.parametrize("arq_id", [b"\xff\x00", b"x" * 5000, b" "])
async def test_a_strange_id_keeps_no_message_from_being_adopted_or_parked(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str, arq_id: bytes
) -> None:
    await put(client, call("act_out"), arq_id)
    await carry_out_all(bench, redis_url)
    await put(client, PICKLE, arq_id)
    await carry_out_all(bench, redis_url)
    assert await stage.notes() == ["done"]
    assert len(await parked(stage)) == 1
    assert await client.keys("*") == []


async def test_a_message_stays_in_redis_while_postgresql_is_away(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str, sessions: Sessions
) -> None:
    await put(client, call("act_out"))
    await stage.value("ALTER TABLE bulwark.job RENAME TO job_elsewhere")
    with capture_logs() as logs:
        (message,) = await carry_out_all(bench, redis_url)
    assert [line["event"] for line in logs] == ["message.not_adopted"]
    assert await client.get("arq:job:theirs") == message.content
    await stage.value("ALTER TABLE bulwark.job_elsewhere RENAME TO job")
    await client.delete("arq:in-progress:theirs")
    await carry_out_all(bench, redis_url)
    assert await stage.notes() == ["done"]


async def test_a_ring_of_a_job_that_this_worker_does_not_know_is_told_and_the_job_waits(
    bench: Bench, stage: Stage, sessions: Sessions, client: ArqRedis, redis_url: str
) -> None:
    accepted = await Producer(sessions, bench.jobs, Bell(client)).enqueue(ActOut())
    bench.jobs = discover_jobs()
    with capture_logs() as logs:
        await carry_out_all(bench, redis_url)
    assert [(line["event"], line["kind"]) for line in logs] == [("job.unknown", "act_out")]
    assert await stage.ended_as(accepted.job_id) == ("queued", None, 0)


async def test_a_message_whose_id_was_used_again_before_it_was_removed_leaves_the_new_one(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str
) -> None:
    """Redis was wiped meanwhile, or the lease ran out and another worker removed the first."""
    await client.enqueue_job("act_out", {"note": "first"}, _job_id="nightly")
    async with heard(bench, redis_url) as (delivery, (first,)):
        await client.flushdb()
        await client.enqueue_job("act_out", {"note": "second"}, _job_id="nightly")
        await delivery.carry_out(first)
    assert await client.exists("arq:job:nightly") == 1
    bench.worker_id = uuid4()
    await carry_out_all(bench, redis_url)
    assert await stage.notes() == ["first", "second"]
    assert await client.keys("*") == []


async def test_a_message_that_appears_under_an_id_that_named_none_is_left_to_be_heard(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str
) -> None:
    await put(client, None)
    async with heard(bench, redis_url) as (delivery, (gone,)):
        await put(client, call("act_out"))
        await delivery.carry_out(gone)
    assert [reason for *_, reason in await parked(stage)] == ["gone"]
    assert await client.exists("arq:job:theirs") == 1
    assert await client.zscore(QUEUE, "theirs") is not None


async def test_a_plain_message_that_looks_like_a_ring_in_all_but_its_time_is_not_lost(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str
) -> None:
    for name in ("act_out", "no_such_job"):
        await client.enqueue_job(name, _job_id=f"{uuid4()}:1")
    await carry_out_all(bench, redis_url)
    assert await stage.notes() == ["done"]
    assert [(kind, reason) for _, _, kind, _, reason in await parked(stage)] == [
        ("no_such_job", "unknown_job")
    ]
    assert await client.keys("*") == []


async def test_a_ring_that_somebody_has_put_off_still_runs_its_job_and_no_other(
    bench: Bench, stage: Stage, sessions: Sessions, client: ArqRedis, redis_url: str
) -> None:
    """A worker of arq's own does so when its function raises Retry."""
    await Producer(sessions, bench.jobs, Bell(client)).enqueue(ActOut(note="rung"))
    ((ring, _),) = await client.zrange(QUEUE, 0, -1, withscores=True)
    await client.zadd(QUEUE, {ring: 1})
    await carry_out_all(bench, redis_url)
    assert await stage.notes() == ["rung"]
    assert await stage.value("SELECT count(*) FROM bulwark.job") == 1
    assert await client.keys("*") == []


async def test_a_message_of_a_wrong_type_is_parked_as_redis_dumps_it_and_stops_no_other(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str
) -> None:
    await client.rpush("arq:job:theirs", "a", "b")  # type: ignore[misc]  # redis-py types it as sync too
    await client.zadd(QUEUE, {"theirs": 1})
    await client.enqueue_job("act_out")
    dumped = await client.dump("arq:job:theirs")
    await carry_out_all(bench, redis_url)
    assert await stage.notes() == ["done"]
    assert await parked(stage) == [("theirs", "default", None, dumped, "unreadable")]
    assert await client.keys("*") == []


@pytest.mark.parametrize(
    "broken", [b'"\\z","a":[],"k":{},"et":17', b'"f","a":[],"k":{},"et":' + b"9" * 5000]
)
async def test_a_broken_message_with_the_id_of_a_job_is_parked_and_the_job_left_alone(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str, broken: bytes
) -> None:
    job_id = (await bench.producer.enqueue(ActOut())).job_id
    await put(client, b'\x01{"t":null,"f":' + broken + b"}", f"{job_id}:7")
    await carry_out_all(bench, redis_url)
    assert [reason for *_, reason in await parked(stage)] == ["unreadable"]
    assert await client.keys("*") == []
    assert await stage.ended_as(job_id) == ("queued", None, 0)


async def test_a_message_that_is_a_ring_but_for_its_json_is_parked(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str
) -> None:
    """Redis itself takes it for a ring: id, score and the look of its text fit."""
    arq_id, now_ms = f"{uuid4()}:1", 1_700_000_000_000
    broken = b'\x01{"t":null,"f":"\\z","a":[],"k":{},"et":1700000000000}'
    await client.set(f"arq:job:{arq_id}", broken)
    await client.zadd(QUEUE, {arq_id: score_ms(now_ms, 0)})
    (message,) = await carry_out_all(bench, redis_url)
    assert message.is_ring
    assert await parked(stage) == [(arq_id, "default", None, broken, "unreadable")]


async def test_a_pickle_that_would_touch_a_file_is_parked_and_never_run(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str, tmp_path: Path
) -> None:
    touched = tmp_path / "touched"
    exploit = pickle.dumps(Touching(touched))
    ring_id = f"{uuid4()}:1"
    await put(client, exploit, "theirs")
    await put(client, b"\x01" + exploit, "theirs, behind our byte")
    await put(client, exploit, ring_id)
    await client.zadd(QUEUE, {ring_id: score_ms(1_700_000_000_000, 0)})
    await carry_out_all(bench, redis_url)
    reasons = sorted((row[0], row[4]) for row in await parked(stage))
    assert reasons == sorted(
        [("theirs", "pickle"), ("theirs, behind our byte", "unreadable"), (ring_id, "pickle")]
    )
    assert not touched.exists()
    pickle.loads(exploit)
    assert touched.exists()  # it would have worked


class Touching:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)
