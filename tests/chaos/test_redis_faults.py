"""Redis is emptied, killed, restarted, filled or cut off, under workers with their defaults."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from jobs import Producer, discover_jobs
from jobs._bell import Bell
from tests.chaos.conftest import Provoked
from tests.invariants import check_invariants
from tests.own_servers import OwnRedis
from tests.sample_jobs.act_out import ActOut
from tests.stage import SAMPLE_JOBS, Stage
from tests.wire import Wire, wired
from tests.workers import Start, WorkerProcess, environment, until
from worker.redis_pool import make_redis
from worker.settings import Settings

pytestmark = pytest.mark.once

Sessions = async_sessionmaker[AsyncSession]
SLOTS = Settings.model_fields["max_jobs"].default
REDIS_TIMEOUT_S = Settings.model_fields["redis_timeout_s"].default
BEFORE = 20
DURING = 5
SETTINGS = {"job_modules": ",".join(SAMPLE_JOBS), "log_format": "json"}
EVICTING = ("allkeys-lru", "allkeys-random", "volatile-ttl")


@dataclass
class Site:
    """A worker, and a producer, whose Redis is about to suffer; all notes are different."""

    stage: Stage
    producer: Producer
    worker: WorkerProcess
    accepted: int = 0
    recovery_s: list[float] = field(default_factory=list)

    async def enqueue(self, jobs: int, *, gate: bool = False) -> None:
        numbers = range(self.accepted, self.accepted + jobs)
        for number in numbers:
            await self.producer.enqueue(ActOut(note=f"note {number}", gate=gate))
        self.accepted += jobs

    async def suffer(self, fault: Callable[["Site"], Awaitable[float]]) -> None:
        """Let it happen while every slot is taken and jobs wait; measure until all have ended.

        The fault tells from when on the recovery counts.
        """
        await self.stage.close_gate()
        await self.enqueue(SLOTS, gate=True)
        await self.stage.somebody_at_gate(SLOTS)
        await self.enqueue(BEFORE)
        since_s = await fault(self)
        await self.stage.open_gate()
        await until(self.all_ended, "all jobs have ended")
        self.recovery_s.append(time.monotonic() - since_s)

    async def all_ended(self) -> bool:
        ended = await self.stage.value(
            "SELECT count(*) FROM bulwark.job WHERE state = 'succeeded' AND attempt = 0"
        )
        return bool(ended == self.accepted)

    async def until_said(self, event: str, times: int) -> None:
        async def said() -> bool:
            return self.worker.told().count(event) >= times

        await until(said, f"the worker has said {event} {times} times")

    async def check(
        self, database_url: str, provoked: Provoked, fault: str, times: int | None = None
    ) -> None:
        """Every note was written once, and all else is as it must be.

        A fault was provoked as often as its recovery was measured, if nothing else is said.
        """
        notes = await self.stage.notes()
        losses = await check_invariants(database_url)
        provoked(
            fault,
            times=len(self.recovery_s) if times is None else times,
            jobs=self.accepted,
            lost=self.accepted - len(set(notes)) + losses.lost,
            doubled=len(notes) - len(set(notes)) + losses.doubled,
            recovery_s=self.recovery_s,
        )
        assert not losses
        assert self.worker.terminate() == 0


@asynccontextmanager
async def site_on(
    redis_url: str, database_url: str, sessions: Sessions, stage: Stage, start: Start
) -> AsyncIterator[Site]:
    redis = make_redis(redis_url, REDIS_TIMEOUT_S)
    producer = Producer(sessions, discover_jobs(SAMPLE_JOBS), Bell(redis))
    try:
        yield Site(stage, producer, start(environment(database_url, redis_url, **SETTINGS)))
    finally:
        await redis.aclose(close_connection_pool=True)


@pytest.fixture
async def site(
    valkey: OwnRedis, database_url: str, sessions: Sessions, stage: Stage, start: Start
) -> AsyncIterator[Site]:
    async with site_on(valkey.url, database_url, sessions, stage, start) as site:
        yield site


async def emptied(site: Site, valkey: OwnRedis) -> float:
    async with Redis.from_url(valkey.url) as redis:
        await redis.flushall()
    since_s = time.monotonic()
    await site.enqueue(DURING)
    return since_s


async def away(site: Site, valkey: OwnRedis, end: Callable[[], None]) -> float:
    times = site.worker.told().count("relay.failed")
    end()
    await site.until_said("relay.failed", times + 1)
    await site.enqueue(DURING)
    valkey.start()
    return time.monotonic()


async def restarted_with_its_data(site: Site, valkey: OwnRedis) -> float:
    async with Redis.from_url(valkey.url) as redis:
        await redis.config_set("save", "3600 1")  # it then saves all at its end, and reads it back
    return await away(site, valkey, valkey.stop)


async def crowded(site: Site, valkey: OwnRedis) -> float:
    """Let it throw away whatever it likes, from now on."""
    async with Redis.from_url(valkey.url) as redis:
        used = (await redis.info("memory"))["used_memory"]
        await redis.config_set("maxmemory-policy", "allkeys-random")
        await redis.config_set("maxmemory", used - 1)
        await site.enqueue(DURING)
        await redis.config_set("maxmemory", 0)
    return time.monotonic()


async def test_jobs_run_soon_after_redis_was_emptied(
    site: Site, valkey: OwnRedis, database_url: str, provoked: Provoked
) -> None:
    for _ in range(4):
        await site.suffer(partial(emptied, valkey=valkey))
    await site.check(database_url, provoked, "Redis: FLUSHALL")


async def test_jobs_run_soon_after_redis_was_killed_and_has_forgotten_everything(
    site: Site, valkey: OwnRedis, database_url: str, provoked: Provoked
) -> None:
    for _ in range(4):
        await site.suffer(partial(away, valkey=valkey, end=valkey.kill))
    await site.check(database_url, provoked, "Redis: kill -9 without persistence")


async def test_jobs_run_soon_after_redis_was_restarted(
    site: Site, valkey: OwnRedis, database_url: str, provoked: Provoked
) -> None:
    for _ in range(2):
        await site.suffer(partial(away, valkey=valkey, end=valkey.stop))
        await site.suffer(partial(restarted_with_its_data, valkey=valkey))
    await site.check(database_url, provoked, "Redis: restart")


async def test_jobs_run_soon_after_connections_to_redis_have_become_black_holes(
    redis_url: str,
    database_url: str,
    sessions: Sessions,
    stage: Stage,
    start: Start,
    provoked: Provoked,
) -> None:
    async with (
        wired(redis_url) as (wire, url),
        site_on(url, database_url, sessions, stage, start) as site,
    ):
        for _ in range(4):
            await site.suffer(partial(cut_off, wire=wire))
        await site.check(database_url, provoked, "Redis: black-holed connection")


async def cut_off(site: Site, wire: Wire) -> float:
    """All connections go dead, and new ones are good."""
    wire.hush()
    wire.mend()
    since_s = time.monotonic()
    await site.enqueue(1)
    return since_s


async def test_no_job_is_lost_when_redis_begins_to_evict(
    site: Site, valkey: OwnRedis, database_url: str, provoked: Provoked
) -> None:
    await site.suffer(partial(crowded, valkey=valkey))
    await site.check(database_url, provoked, "Redis: evicting while running")


async def test_a_worker_does_not_start_on_a_redis_that_may_evict_and_the_jobs_wait(
    valkey: OwnRedis,
    database_url: str,
    sessions: Sessions,
    stage: Stage,
    start: Start,
    provoked: Provoked,
) -> None:
    producer = Producer(sessions, discover_jobs(SAMPLE_JOBS))
    await producer.enqueue_many([ActOut(note=f"note {number}") for number in range(BEFORE)])
    async with Redis.from_url(valkey.url) as redis:
        await redis.config_set("maxmemory", "100mb")
        for policy in EVICTING:
            await redis.config_set("maxmemory-policy", policy)
            await is_refused(start(environment(database_url, valkey.url, **SETTINGS)))
        assert await stage.value("SELECT count(*) FROM bulwark.worker") == 0
        await redis.config_set("maxmemory-policy", "noeviction")
    async with site_on(valkey.url, database_url, sessions, stage, start) as site:
        site.accepted = BEFORE
        await until(site.all_ended, "all jobs have ended")
        fault = "Redis: evicting policy, refused at start"
        await site.check(database_url, provoked, fault, times=len(EVICTING))


async def is_refused(worker: WorkerProcess) -> None:
    """Wait until it has ended by itself, with an error that names the remedy."""

    async def has_ended() -> bool:
        return not worker.running

    await until(has_ended, "the worker gives up")
    assert "noeviction" in worker.log.read_text()
    assert worker.terminate() != 0
