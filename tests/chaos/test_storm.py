"""Jobs of every kind in a storm of random faults; CHAOS_SEED=... repeats one."""

import asyncio
import os
import random
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import asyncpg
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.engine import PoolProfile, create_engine, make_sessions
from db.ledger.cancellation import cancel
from db.ledger.dead_letter import Choice, choose_failed, retry
from db.ledger.job import Ring
from db.migrations import upgrade
from db.retry import DATABASE_ERRORS
from db.transaction import transaction
from jobs import Payload, Producer, discover_jobs
from jobs._bell import Bell
from tests.chaos.conftest import Provoked
from tests.clocks import off_by
from tests.crowd import Crowd
from tests.invariants import check_invariants
from tests.outages import accepted_at_last, all_connections_taken
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
LATE = 5
SOME = 8
A_MINUTE_S = 60
CALM_AGAIN_S = 900.0
Order = tuple[Payload, str]
"""What is to be done, and the idempotency key by which it may be asked for again."""
Sessions = async_sessionmaker[AsyncSession]


@dataclass
class Storm:
    """Servers of its own, some workers, and everything that befalls them.

    The list of faults is by the `order`, by which nothing else is, so that a seed repeats it.
    """

    order: random.Random
    chance: random.Random
    postgres: OwnPostgres
    valkey: OwnRedis
    wire: Wire
    start: Callable[[int], WorkerProcess]
    producer: Producer
    sessions: Sessions
    held_back: list[Order] = field(default_factory=list)
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
            self.commit_late,
            self.put_clock_wrong,
            self.lock_tables,
            self.take_all_connections,
            self.cancel_some,
            self.retry_failed,
        ]
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + seconds
        due: list[Callable[[], Awaitable[None]]] = []
        while loop.time() < ends_s:
            due = due or self.order.sample(faults, len(faults))  # each before any comes again
            fault = due.pop()
            self.replace_refused()
            next_s = loop.time() + INTERVAL_S
            self.happened.append(fault.__name__)
            await fault()
            await asyncio.sleep(next_s - loop.time())  # the pace of the storm
        await asyncio.gather(*self._beside)

    def replace_refused(self) -> None:
        """Start anew what has found a server away at its start and ended, as a supervisor would."""
        for at, one in enumerate(self.workers):
            if not one.running and not has_started(one):
                self.workers[at] = self.start(0)

    async def all_are_up(self) -> bool:
        self.replace_refused()
        return all(map(has_started, self.workers))

    def _one(self) -> int:
        return self.chance.randrange(len(self.workers))

    async def kill(self) -> None:
        at = self._one()
        await asyncio.to_thread(self.workers[at].kill)
        self.workers[at] = self.start(0)

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
        worker, self.workers[at] = self.workers[at], self.start(0)
        worker.signal(signal.SIGTERM)

    async def put_clock_wrong(self) -> None:
        """The worker that takes the place of another is a minute early or late."""
        at, off_s = self._one(), self.chance.choice([-A_MINUTE_S, A_MINUTE_S])
        worker, self.workers[at] = self.workers[at], self.start(off_s)
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
                    "SELECT id, ring, kind, queue, priority FROM bulwark.job ORDER BY id"
                )
            rows = self.chance.sample(rows, min(len(rows), DUPLICATES))
            async with make_redis(self.valkey.url, 1.0) as redis:
                await Bell(redis).ring([Ring(*row) for row in rows])
                await Bell(redis).ring([Ring(row[0], row[1] + 1000, *row[2:]) for row in rows])

    async def commit_late(self) -> None:
        """Commit jobs when others, of higher ids, have been rung."""
        payloads, keys = zip(*(self.held_back.pop() for _ in range(LATE)), strict=True)

        async def accept() -> None:
            async with self.sessions() as session:
                await self.producer.enqueue_many(payloads, session=session, idempotency_keys=keys)
                await asyncio.sleep(INTERVAL_S)  # so much later they are committed
                await session.commit()

        await until(partial(accepted_at_last, accept), "the late jobs are accepted")

    async def lock_tables(self) -> None:
        """Wait for the tables, as all others then wait behind it, and keep them for a while."""
        with suppress(*DATABASE_ERRORS):
            async with connected(self.postgres.url) as connection, connection.transaction():
                await connection.execute("SET LOCAL lock_timeout = '2s'")
                await connection.execute("LOCK TABLE hero, team, note")
                await asyncio.sleep(self.chance.uniform(1.0, 2.0))  # so long they are locked

    async def take_all_connections(self) -> None:
        with suppress(*DATABASE_ERRORS):
            async with all_connections_taken(self.postgres.url):
                await asyncio.sleep(self.chance.uniform(1.0, 2.0))  # so long there is none

    async def cancel_some(self) -> None:
        """As `bulwark cancel` does, with --now or without it."""
        with suppress(*DATABASE_ERRORS):
            for state in ("running", "queued"):
                for job_id in await self._some_of(state):
                    at_once = self.chance.random() < 0.5
                    work = partial(cancel, job_id=job_id, actor=None, at_once=at_once)
                    await transaction(self.sessions, work, name="job.cancel", receipted=True)

    async def retry_failed(self) -> None:
        """As `bulwark retry` does: all that have failed, and by their ids some that were cancelled.

        These go on behind what they have committed.
        """
        with suppress(*DATABASE_ERRORS):
            cancelled = await self._some_of("cancelled")

            async def work(session: AsyncSession) -> None:
                await retry(session, [*await choose_failed(session, Choice()), *cancelled])

            await transaction(self.sessions, work, name="job.retry")

    async def _some_of(self, state: str) -> list[UUID]:
        async with connected(self.postgres.url) as connection:
            rows = await connection.fetch(
                "SELECT id FROM bulwark.job WHERE state = $1 ORDER BY id", state
            )
        return [row[0] for row in self.chance.sample(rows, min(len(rows), SOME))]


def has_started(worker: WorkerProcess) -> bool:
    """Whether it is up; one that was lost begins anew, and may find a server away then."""
    lives = [one for one in worker.told() if one in ("worker.started", "worker.lost")]
    return lives[-1:] == ["worker.started"]


@asynccontextmanager
async def storm_over(start: Start, workers: int, seed: int, folder: Path) -> AsyncIterator[Storm]:
    with own_postgres(durable=True) as postgres, own_redis() as valkey:
        await asyncio.to_thread(upgrade, postgres.url)
        async with (
            wired(valkey.url) as (wire, url),
            producing(postgres.url, valkey.url) as (producer, sessions),
        ):
            settings = {"job_modules": ",".join(JOB_MODULES), "log_format": "json"}
            env = environment(postgres.url, url, **settings)

            def start_off(off_s: int) -> WorkerProcess:
                return start(off_by(off_s, env, folder) if off_s else env)

            order, chance = random.Random(seed), random.Random(seed)
            storm = Storm(order, chance, postgres, valkey, wire, start_off, producer, sessions)
            storm.workers = [start_off(0) for _ in range(workers)]
            await until(storm.all_are_up, "the workers have started")
            yield storm


@asynccontextmanager
async def producing(url: str, redis_url: str) -> AsyncIterator[tuple[Producer, Sessions]]:
    engine = create_engine(url, profile=PoolProfile.LIGHT, application_name="producer")
    sessions = make_sessions(engine)
    async with make_redis(redis_url, 1.0) as redis:
        yield Producer(sessions, discover_jobs(JOB_MODULES), Bell(redis)), sessions
    await engine.dispose()


async def enqueue_all(storm: Storm, orders: Sequence[Order], seconds: float) -> None:
    """Spread over the time; what was not accepted for sure is asked for again by its key."""
    batches = range(0, len(orders), AT_A_TIME)
    for first in batches:
        payloads, keys = zip(*orders[first : first + AT_A_TIME], strict=True)
        accept = partial(storm.producer.enqueue_many, payloads, idempotency_keys=keys)
        await until(partial(accepted_at_last, accept), "the jobs are accepted")
        await asyncio.sleep(0.9 * seconds / len(batches))  # the pace of the producer


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
    jobs: int, workers: int, seconds: float, start: Start, provoked: Provoked, tmp_path: Path
) -> None:
    seed = int(os.environ.get("CHAOS_SEED") or secrets.randbelow(10**9))
    sys.stdout.write(f"CHAOS_SEED={seed}\n")
    crowd = Crowd(random.Random(seed))
    crowd.gather(jobs)
    async with storm_over(start, workers, seed, tmp_path) as storm:
        url = storm.postgres.url
        async with connected(url) as connection:
            await connection.execute(NOTES)
            seeded = await crowd.take_places(connection)
        orders = [(payload, f"{n}") for n, payload in enumerate(crowd.payloads)]
        storm.held_back = orders[: LATE * round(seconds / INTERVAL_S)]
        rest = orders[len(storm.held_back) :]
        enqueueing = asyncio.create_task(enqueue_all(storm, rest, seconds))
        await storm.rage(seconds)
        over_s = time.monotonic()
        await enqueueing
        if storm.held_back:
            await enqueue_all(storm, storm.held_back, 0)

        async def all_ended() -> bool:
            storm.replace_refused()
            return await open_jobs(url) == 0 and await storm.all_are_up()

        await until(all_ended, f"all jobs have ended (CHAOS_SEED={seed})", CALM_AGAIN_S)
        calm_s = time.monotonic() - over_s
        codes = await asyncio.gather(*(asyncio.to_thread(one.terminate) for one in storm.workers))
        losses = await check_invariants(url, seeded=seeded)
        async with connected(url) as connection:
            cancelled = await crowd.cancelled(connection)
            missing, beyond = await crowd.compare(connection, cancelled)
            ended = await ends(connection)
    sys.stdout.write(f"{storm.happened}\n{ended}\ncancelled, with which rows: {cancelled}\n")
    sys.stdout.write(f"missing {missing[:9]}, beyond {beyond[:9]}\n")
    provoked(
        f"Storm of random faults, {workers} workers, {seconds:g} s, CHAOS_SEED={seed}",
        times=len(storm.happened),
        jobs=jobs,
        lost=len(missing) + losses.lost,
        doubled=len(beyond) + losses.doubled,
        recovery_s=[calm_s],
    )
    assert not losses, f"CHAOS_SEED={seed}"
    assert ended.total() == jobs
    assert len(cancelled) == sum(count for end, count in ended.items() if end[1] == "cancelled")
    failed = {end: count for end, count in ended.items() if end[1] == "failed"}
    refused = failed.pop(("transfer_heroes", "failed", "rejected", 1), 0)
    assert refused <= crowd.shared_moves
    assert failed == {
        ("act_out", "failed", "attempts_exhausted", 3): len(crowd.failing - {*cancelled})
    }
    assert {end[3] for end in ended if end[1] == "succeeded"} == {0}
    assert codes == [0] * workers
