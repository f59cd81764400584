"""The whole system in containers: it comes up, works, and loses nothing when one of them dies."""

import asyncio
import os
import random
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest

from db.engine import PoolProfile, create_engine, make_sessions
from db.retry import DATABASE_ERRORS
from jobs import Bell, Payload, Producer, discover_jobs
from jobs.transfer_heroes import TransferHeroes
from tests.compose.stack import (
    NO_ENV_FILE,
    OF_STORES,
    SERVICES,
    ComposeFailed,
    Stack,
    compose_program,
    inspect,
    running_stack,
)
from tests.workers import ROOT, until
from worker.redis_pool import make_redis

ROWS = 20_000
ROWS_A_CHUNK = 100
TRANSFERS = 400
CRASHES = 8
MOST_PAUSE_S = 3.0
SEED = int(os.environ.get("SMOKE_SEED", time.time_ns() % 1_000_000))
"""What is drawn in this run; give SMOKE_SEED to draw it again."""

COMMITTED = """
    SELECT job.id FROM bulwark.job
     WHERE actor = $1 AND (SELECT count(*) FROM bulwark.chunk WHERE job_id = job.id) > 2
"""
ENDED = "SELECT state FROM bulwark.job WHERE id = $1 AND finished_at IS NOT NULL"
ALL_ENDED = "SELECT bool_and(finished_at IS NOT NULL) FROM bulwark.job"
NOTHING_IS_LEFT = """
    SELECT count(*) = 0 FROM pg_stat_activity
     WHERE datname = current_database() AND state LIKE 'idle in transaction%' AND xact_start < $1
"""
EVERYTHING = """
    SELECT jsonb_build_object(
        'heroes', (SELECT count(*) FROM hero), 'transfers', (SELECT count(*) FROM transfer),
        'audit', (SELECT sum(rows) FROM bulwark.audit),
        'jobs', (SELECT jsonb_object_agg(id, state) FROM bulwark.job))
"""


@pytest.fixture(scope="module")
def stack(image: None) -> Iterator[Stack]:
    """With one worker, which gives its jobs back as soon as it is told to stop."""
    with running_stack(BULWARK_SHUTDOWN_GRACE_S="0", AWS_REGION="nowhere") as stack:
        stack.up()
        stack.accept("import", "team", "-", stdin=b"name\nReds\nBlues\n")
        yield stack


@pytest.fixture(scope="module", autouse=True)
def seed(facts: list[str]) -> None:
    facts.append(f"seed of the crashes: SMOKE_SEED={SEED}")


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(f"{SEED} {request.node.name}")


def heroes(prefix: str, rows: int = ROWS) -> bytes:
    lines = (f"{prefix}-{number},Hero {number},{number % 90}" for number in range(rows))
    return "\n".join(["external_id,name,age", *lines, ""]).encode()


@pytest.mark.parametrize("victim", ["worker", "postgres", "redis"])
async def test_an_import_goes_on_after_the_crash_of_a_container(
    victim: str, stack: Stack, facts: list[str]
) -> None:
    [container] = stack.containers(victim)
    job_id = await importing(stack, victim)
    chunks = await stack.value("SELECT count(*) FROM bulwark.chunk WHERE job_id = $1", job_id)
    assert stack.crash(container)
    crashed_s = time.monotonic()

    state = await stack.seen(ENDED, "the job has ended", job_id)

    facts.append(
        f"{victim} crashed after {chunks} of {ROWS // ROWS_A_CHUNK} chunks; "
        f"the import ended {time.monotonic() - crashed_s:.1f} s later"
    )
    assert state == "succeeded"
    assert chunks < ROWS // ROWS_A_CHUNK
    assert await inserted(stack, job_id) == (ROWS, ROWS, ROWS)
    assert len(await hero_ids(stack, victim)) == ROWS


async def importing(stack: Stack, name: str, rows_a_chunk: int = ROWS_A_CHUNK) -> str:
    """The id of an import of that actor, of which some chunks, and not all, are committed."""
    words = ("import", "hero", "-", "--chunk-rows", str(rows_a_chunk), "--actor", name)
    accepting = asyncio.create_task(asyncio.to_thread(stack.accept, *words, stdin=heroes(name)))
    job_id: str = await stack.seen(COMMITTED, "some chunks are committed", name)
    accepting.add_done_callback(lambda task: task.exception())  # its container may be cut off, too
    return job_id


async def inserted(stack: Stack, job_id: str) -> tuple[int, int, int]:
    """Rows that were inserted by the receipts, rows of the input, and rows in the audit."""
    async with stack.connection() as connection:
        row = await connection.fetchrow(
            """
            SELECT sum((counts ->> 'inserted')::int), sum(rows),
                   (SELECT sum(rows) FROM bulwark.audit WHERE job_id = $1)
              FROM bulwark.chunk WHERE job_id = $1
            """,
            job_id,
        )
    return row[0], row[1], row[2]


async def test_three_workers_transfer_each_hero_once_while_any_container_dies(
    stack: Stack, chance: random.Random, facts: list[str]
) -> None:
    """A producer on this machine enqueues all the while, and tries again what was not accepted."""
    await asyncio.to_thread(stack.up, 3)
    await imported(stack, "moving", TRANSFERS)
    ids = await hero_ids(stack, "moving")
    team_id = await stack.value("SELECT id FROM team WHERE name = 'Reds'")
    crashing = asyncio.create_task(asyncio.to_thread(crash_again_and_again, stack, chance))
    pause_s = MOST_PAUSE_S * CRASHES / TRANSFERS
    orders = {f"move {one}": TransferHeroes(hero_ids=[one], to_team_id=team_id) for one in ids}
    await accept_all(stack, orders, pause_s)
    crashed = await crashing

    await stack.seen(ALL_ENDED, "all jobs have ended")

    facts.append(f"crashed during {TRANSFERS} transfers: {', '.join(crashed)}")
    async with stack.connection() as connection:
        ends = await connection.fetch(
            "SELECT state, count(*) FROM bulwark.job WHERE kind = 'transfer_heroes' GROUP BY state"
        )
        moved = await connection.fetchrow(
            "SELECT count(*), count(DISTINCT hero_id) FROM transfer WHERE to_team_id = $1", team_id
        )
        audited = await connection.fetchval(
            "SELECT count(*) FROM bulwark.audit WHERE table_name = 'transfer' AND action = 'insert'"
        )
    assert {row[0]: row[1] for row in ends} == {"succeeded": TRANSFERS}
    assert (moved[0], moved[1], audited) == (TRANSFERS, TRANSFERS, TRANSFERS)
    now = await stack.value("SELECT clock_timestamp()")
    await stack.seen(NOTHING_IS_LEFT, "no transaction stays open", now, timeout_s=30.0)


def crash_again_and_again(stack: Stack, chance: random.Random) -> list[str]:
    """Crash a container of each service, some twice, at moments that are drawn."""
    victims = [*SERVICES, *chance.choices(SERVICES, k=CRASHES - len(SERVICES))]
    chance.shuffle(victims)
    for service in victims:
        time.sleep(chance.uniform(0.5, MOST_PAUSE_S))  # the moment is drawn; nothing is waited for
        while not stack.crash_one(service, chance):
            time.sleep(0.1)  # it has not come back from its last crash
    return victims


async def imported(stack: Stack, prefix: str, rows: int) -> None:
    job_id = await asyncio.to_thread(
        stack.accept, "import", "hero", "-", stdin=heroes(prefix, rows)
    )
    assert await stack.seen(ENDED, "the job has ended", job_id) == "succeeded"


async def hero_ids(stack: Stack, prefix: str) -> list[int]:
    async with stack.connection() as connection:
        rows = await connection.fetch(
            f"SELECT id FROM hero WHERE external_id LIKE '{prefix}-%' ORDER BY id"
        )
    return [row["id"] for row in rows]


async def accept_all(stack: Stack, payloads: Mapping[str, Payload], pause_s: float) -> None:
    """Enqueue each under its key until PostgreSQL has said yes; nothing is enqueued twice."""
    waiting = dict(payloads)
    while waiting:
        with suppress(*DATABASE_ERRORS, ComposeFailed):
            async with producer_on(stack) as producer:
                for key, payload in list(waiting.items()):
                    await producer.enqueue(payload, idempotency_key=key)
                    del waiting[key]
                    await asyncio.sleep(pause_s)  # so that there are some at any moment


@asynccontextmanager
async def producer_on(stack: Stack) -> AsyncIterator[Producer]:
    """A producer on this machine, which speaks to the containers by their ports on loopback."""
    engine = create_engine(
        await asyncio.to_thread(lambda: stack.database_url),
        profile=PoolProfile.LIGHT,
        application_name="smoke test",
    )
    try:
        async with make_redis(await asyncio.to_thread(lambda: stack.redis_url), 5.0) as redis:
            yield Producer(make_sessions(engine), discover_jobs(), Bell(redis))
    finally:
        await engine.dispose()


def test_of_what_object_stores_need_a_worker_has_what_is_set_and_nothing_else(
    stack: Stack,
) -> None:
    environment = stack.compose("exec", "-T", "worker", "env").split()
    assert [one for one in environment if one.startswith(OF_STORES)] == ["AWS_REGION=nowhere"]


async def test_what_is_purged_is_archived_and_put_back_by_a_worker_started_anew(
    stack: Stack,
) -> None:
    await imported(stack, "purged", 10)
    purge = ("purge", "hero", "--retention-days", "hero=0", "--archive", "/archive")
    gone = "SELECT count(*) = 0 FROM hero WHERE external_id LIKE 'purged-%'"
    delete = ("delete", "hero", "--filter", "external_id~purged-%")
    deleted = await asyncio.to_thread(stack.accept, *delete)
    assert await stack.seen(ENDED, "they are deleted", deleted) == "succeeded"
    purged = await asyncio.to_thread(stack.accept, *purge)
    assert await stack.seen(ENDED, "they are purged", purged) == "succeeded"
    assert await stack.value(gone)

    await asyncio.to_thread(stack.compose, "rm", "--stop", "--force", "worker")
    await asyncio.to_thread(stack.up)
    restored = await asyncio.to_thread(stack.accept, "restore-archive", f"/archive/{purged}")

    assert await stack.seen(ENDED, "they are put back", restored) == "succeeded"
    assert not await stack.value(gone)


async def test_workers_told_to_stop_give_their_jobs_back_and_end_with_zero(stack: Stack) -> None:
    await asyncio.to_thread(stack.up, 3)
    workers = stack.containers("worker")
    job_id = await importing(stack, "stopped", rows_a_chunk=10)

    await asyncio.to_thread(stack.compose, "stop", "worker")

    assert [inspect(one, "{{.State.ExitCode}}") for one in workers] == ["0"] * 3
    state = "SELECT state || ' ' || attempt FROM bulwark.job WHERE id = $1"
    assert await stack.value(state, job_id) == "queued 0"
    await asyncio.to_thread(stack.up)
    assert await stack.seen(ENDED, "the job has ended", job_id) == "succeeded"
    assert await inserted(stack, job_id) == (ROWS, ROWS, ROWS)


async def test_down_and_up_again_loses_nothing(stack: Stack) -> None:
    await asyncio.to_thread(stack.up, 0)
    job_id = await asyncio.to_thread(stack.accept, "import", "hero", "-", stdin=heroes("waiting"))
    before = await stack.value(EVERYTHING)

    await asyncio.to_thread(stack.down)
    await asyncio.to_thread(stack.up, 0)

    assert await stack.value(EVERYTHING) == before
    await asyncio.to_thread(stack.up)
    assert await stack.seen(ENDED, "the job has ended", job_id) == "succeeded"
    assert await inserted(stack, job_id) == (ROWS, ROWS, ROWS)


async def test_a_container_that_dies_while_everything_starts_holds_nothing_up(
    image: None, chance: random.Random, facts: list[str]
) -> None:
    with running_stack() as stack:
        starting = asyncio.create_task(asyncio.to_thread(stack.up))
        await until(partial(asyncio.to_thread, stack.containers, "migrate"), "migrate has begun")
        await asyncio.sleep(chance.uniform(0.0, 3.0))  # the moment is drawn
        victims = chance.sample(["postgres", "redis", "migrate"], 3)
        crashed = [one for one in victims if await asyncio.to_thread(stack.crash_one, one, chance)]
        await asyncio.wait([starting])
        said = starting.exception()
        facts.append(f"crashed while starting: {', '.join(crashed)}; compose {said or 'went on'}")
        assert crashed
        if said is not None:
            await asyncio.to_thread(stack.up)
        await imported(stack, "early", 10)


def test_without_passwords_it_says_in_one_sentence_what_to_set() -> None:
    env = {k: v for k, v in os.environ.items() if not k.endswith("_PASSWORD")}
    done = subprocess.run(
        [*compose_program(), *NO_ENV_FILE, "config"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "Set POSTGRES_PASSWORD in the environment or in .env" in done.stderr
