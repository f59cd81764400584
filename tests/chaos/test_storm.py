"""Jobs of every kind in a storm of random faults; CHAOS_SEED=... repeats one."""

import asyncio
import os
import random
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import asyncpg
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from db.engine import PoolProfile, create_engine, make_sessions
from db.ledger.job import Ring
from db.migrations import upgrade
from db.retry import DATABASE_ERRORS, Fault, classify
from jobs import Producer, discover_jobs
from jobs._bell import Bell
from tests.chaos.conftest import Provoked
from tests.crowd import Crowd
from tests.invariants import check_invariants
from tests.own_servers import OwnPostgres, OwnRedis, own_postgres, own_redis
from tests.sample_jobs.act_out import NOTES
from tests.stage import SAMPLE_JOBS, connected
from tests.wire import Wire, wired
from tests.workers import Start, WorkerProcess, environment, until
from worker.redis_pool import make_redis

JOB_MODULES = (*SAMPLE_JOBS, "tests.sample_jobs.come_back")
INTERVAL_S = 2.0
AT_A_TIME = 50
DUPLICATES = 50
CALM_AGAIN_S = 900.0


@dataclass
class Storm:
    """Servers of its own, some workers, and everything that befalls them."""

    chance: random.Random
    postgres: OwnPostgres
    valkey: OwnRedis
    wire: Wire
    start: Callable[[], WorkerProcess]
    workers: list[WorkerProcess] = field(default_factory=list)
    happened: list[str] = field(default_factory=list)
    _beside: list[asyncio.Task[None]] = field(default_factory=list)

    async def rage(self, seconds: float) -> None:
        """Provoke a fault every two seconds, until the time is over; then let all be well."""
        faults: list[Callable[[], Awaitable[None]]] = [
            self.kill,
            self.pause,
            self.stop,
            self.terminate_backends,
            self.flush,
            self.restart_redis,
            self.restart_postgres,
            self.hush,
            self.ring_again,
        ]
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + seconds
        due: list[Callable[[], Awaitable[None]]] = []
        while loop.time() < ends_s:
            due = due or self.chance.sample(faults, len(faults))  # each before any comes again
            fault = due.pop()
            next_s = loop.time() + INTERVAL_S
            self.happened.append(fault.__name__)
            await fault()
            await asyncio.sleep(next_s - loop.time())  # the pace of the storm
        await asyncio.gather(*self._beside)

    def _one(self) -> int:
        return self.chance.randrange(len(self.workers))

    async def kill(self) -> None:
        at = self._one()
        await asyncio.to_thread(self.workers[at].kill)
        self.workers[at] = self.start()

    async def pause(self) -> None:
        """For a moment, or for longer than a worker may be silent."""
        worker, seconds = self.workers[self._one()], self.chance.choice([1.0, 4.0, 18.0])
        worker.signal(signal.SIGSTOP)

        async def resume() -> None:
            await asyncio.sleep(seconds)  # so long the pause is
            worker.signal(signal.SIGCONT)

        self._beside.append(asyncio.create_task(resume()))

    async def stop(self) -> None:
        at = self._one()
        worker, self.workers[at] = self.workers[at], self.start()
        worker.signal(signal.SIGTERM)

    async def terminate_backends(self) -> None:
        with suppress(*DATABASE_ERRORS):
            async with connected(self.postgres.url) as connection:
                pids = await connection.fetch(
                    "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'bulwark %' "
                    "ORDER BY pid"
                )
                for (pid,) in self.chance.sample(pids, len(pids) // 2):
                    await connection.execute("SELECT pg_terminate_backend($1)", pid)

    async def flush(self) -> None:
        async with Redis.from_url(self.valkey.url) as redis:
            await redis.flushall()

    async def restart_redis(self) -> None:
        end = self.chance.choice([self.valkey.kill, self.valkey.stop])
        await asyncio.to_thread(end)
        await asyncio.sleep(self.chance.uniform(0.1, 1.5))  # so long it is away
        await asyncio.to_thread(self.valkey.start)

    async def restart_postgres(self) -> None:
        mode: Literal["fast", "immediate"] = self.chance.choice(["fast", "immediate"])
        await asyncio.to_thread(self.postgres.stop, mode)
        await asyncio.sleep(self.chance.uniform(0.1, 1.5))  # so long it is away
        await asyncio.to_thread(self.postgres.start)

    async def hush(self) -> None:
        self.wire.hush()
        self.wire.mend()

    async def ring_again(self) -> None:
        """Deliver twice, late, and out of order."""
        with suppress(*DATABASE_ERRORS, RedisError):
            async with connected(self.postgres.url) as connection:
                rows = await connection.fetch(
                    "SELECT id, ring, kind, queue, priority FROM bulwark.job "
                    f"ORDER BY random() LIMIT {DUPLICATES}"
                )
            async with make_redis(self.valkey.url, 1.0) as redis:
                await Bell(redis).ring([Ring(*row) for row in rows])
                await Bell(redis).ring([Ring(row[0], row[1] + 1000, *row[2:]) for row in rows])


@asynccontextmanager
async def storm_over(start: Start, workers: int, seed: int) -> AsyncIterator[Storm]:
    with own_postgres(durable=True) as postgres, own_redis() as valkey:
        await asyncio.to_thread(upgrade, postgres.url)
        async with wired(valkey.url) as (wire, url):
            settings = {"job_modules": ",".join(JOB_MODULES), "log_format": "json"}
            env = environment(postgres.url, url, **settings)
            storm = Storm(random.Random(seed), postgres, valkey, wire, lambda: start(env))
            storm.workers = [start(env) for _ in range(workers)]
            yield storm


async def enqueue_all(storm: Storm, crowd: Crowd, seconds: float) -> None:
    """Spread over the time; what was not accepted for sure is asked for again by its key."""
    engine = create_engine(
        storm.postgres.url, profile=PoolProfile.LIGHT, application_name="producer"
    )
    async with make_redis(storm.valkey.url, 1.0) as redis:
        producer = Producer(make_sessions(engine), discover_jobs(JOB_MODULES), Bell(redis))
        batches = range(0, len(crowd.payloads), AT_A_TIME)
        for first in batches:
            payloads = crowd.payloads[first : first + AT_A_TIME]
            keys = [f"{first + n}" for n in range(len(payloads))]
            accept = partial(producer.enqueue_many, payloads, idempotency_keys=keys)
            await until(partial(accepted_at_last, accept), "the jobs are accepted")
            await asyncio.sleep(0.9 * seconds / len(batches))  # the pace of the producer
    await engine.dispose()


async def accepted_at_last(accept: Callable[[], Awaitable[object]]) -> bool:
    """Whether PostgreSQL has taken them; while it is away it may not."""
    try:
        await accept()
    except DATABASE_ERRORS as error:
        if classify(error) is Fault.OUTAGE:
            return False
        raise
    return True


async def open_jobs(url: str) -> int:
    async with connected(url) as connection:
        count: int = await connection.fetchval(
            "SELECT count(*) FROM bulwark.job WHERE state IN ('queued', 'running')"
        )
    return count


async def ends(connection: asyncpg.Connection) -> Counter[tuple[Any, ...]]:
    rows = await connection.fetch(
        "SELECT kind, state, reason, attempt, count(*) FROM bulwark.job GROUP BY 1, 2, 3, 4"
    )
    return Counter({tuple(row[:4]): row[4] for row in rows})


@pytest.mark.parametrize(
    ("jobs", "workers", "seconds"),
    [
        pytest.param(600, 2, 18.0, marks=pytest.mark.once),
        pytest.param(10_000, 4, 120.0, marks=pytest.mark.chaos),
    ],
)
async def test_jobs_of_every_kind_take_effect_once_in_a_storm_of_faults(
    jobs: int, workers: int, seconds: float, start: Start, provoked: Provoked
) -> None:
    seed = int(os.environ.get("CHAOS_SEED") or secrets.randbelow(10**9))
    sys.stdout.write(f"CHAOS_SEED={seed}\n")
    crowd = Crowd(random.Random(seed))
    crowd.gather(jobs)
    async with storm_over(start, workers, seed) as storm:
        url = storm.postgres.url
        async with connected(url) as connection:
            await connection.execute(NOTES)
            seeded = await crowd.take_places(connection)
        enqueueing = asyncio.create_task(enqueue_all(storm, crowd, seconds))
        await storm.rage(seconds)
        over_s = time.monotonic()
        await enqueueing

        async def all_ended() -> bool:
            return await open_jobs(url) == 0

        await until(all_ended, f"all jobs have ended (CHAOS_SEED={seed})", CALM_AGAIN_S)
        calm_s = time.monotonic() - over_s
        codes = await asyncio.gather(*(asyncio.to_thread(one.terminate) for one in storm.workers))
        losses = await check_invariants(url, seeded=seeded)
        async with connected(url) as connection:
            missing, beyond = await crowd.compare(connection)
            ended = await ends(connection)
    sys.stdout.write(f"{storm.happened}\n{ended}\nmissing {missing[:9]}, beyond {beyond[:9]}\n")
    provoked(
        f"Storm of random faults, {workers} workers, {seconds:g} s",
        times=len(storm.happened),
        jobs=jobs,
        lost=len(missing) + losses.lost,
        doubled=len(beyond) + losses.doubled,
        recovery_s=[calm_s],
    )
    assert not losses, f"CHAOS_SEED={seed}"
    assert ended.total() == jobs
    failed = {end: count for end, count in ended.items() if end[1] != "succeeded"}
    refused = failed.pop(("transfer_heroes", "failed", "rejected", 1), 0)
    assert refused <= crowd.shared_moves
    assert failed == {("act_out", "failed", "attempts_exhausted", 3): crowd.failing}
    assert {end[3] for end in ended if end[1] == "succeeded"} == {0}
    assert codes == [0] * workers
