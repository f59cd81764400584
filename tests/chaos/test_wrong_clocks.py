"""Two workers whose clocks are a minute apart: nothing runs early or twice, nothing is stuck."""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from arq.connections import ArqRedis

from jobs._declaration import Payload
from jobs._discovery import discover_jobs
from jobs._producer import Producer
from tests.chaos.conftest import Provoked
from tests.clocks import off_by
from tests.invariants import check_invariants
from tests.sample_jobs.act_out import ActOut
from tests.sample_jobs.keep_watch import KeepWatch
from tests.stage import SAMPLE_JOBS, Stage
from tests.workers import Start, WorkerProcess, environment, until

pytestmark = pytest.mark.once

SETTINGS: Mapping[str, str] = {
    "job_modules": ",".join([*SAMPLE_JOBS, "tests.sample_jobs.keep_watch"]),
    "schedules": '{"vigil": {"enabled": false}}',
    "beat_interval_s": "0.3",
    "lost_after_s": "5.0",
    "relay_interval_s": "0.1",
}
QUEUES = ("wrong", "right")
"""Beside the one that both serve, each worker has one of its own."""
LOST_AFTER = timedelta(seconds=5)
A_MINUTE_S = 60
SOON = timedelta(seconds=3)
LATE = timedelta(seconds=20)
"""Far less than what the clocks are apart."""
WATCH = KeepWatch().note

ACT_NOW = """
    UPDATE bulwark.job SET payload = jsonb_set(payload, '{then}', '"return"') WHERE id = $1
"""


class Pair:
    """Two workers, of which one has a wrong clock, and a stage that has PostgreSQL's."""

    def __init__(self, stage: Stage, producer: Producer, workers: list[WorkerProcess]) -> None:
        self.stage = stage
        self.workers = workers
        self._producer = producer

    async def accept(self, payload: Payload, **terms: Any) -> UUID:
        return (await self._producer.enqueue(payload, **terms)).job_id

    async def now(self) -> Any:
        return await self.stage.value("SELECT clock_timestamp()")

    async def waits_as(self, job_id: UUID, reason: str) -> dict[str, Any]:
        """The job's row once it was put back for this reason."""

        async def look() -> dict[str, Any] | None:
            row = await self.stage.row(job_id)
            return row if (row["state"], row["reason"]) == ("queued", reason) else None

        return await until(look, f"the job waits, {reason}")

    async def claimed_again(self, before: dict[str, Any]) -> dict[str, Any]:
        """The job's row once somebody has taken it for good, however often it was put off."""

        async def look() -> dict[str, Any] | None:
            row = await self.stage.row(before["id"])
            is_taken = row["state"] != "queued" and row["claimed_at"] > before["claimed_at"]
            return row if is_taken else None

        return await until(look, "the job is taken again")


@pytest.fixture(params=[-A_MINUTE_S, A_MINUTE_S])
async def pair(
    request: pytest.FixtureRequest,
    stage: Stage,
    sessions: Any,
    start: Start,
    database_url: str,
    redis_url: str,
    tmp_path: Path,
) -> Pair:
    wrong, right = (
        environment(database_url, redis_url, **SETTINGS, queues=f"default,{queue}")
        for queue in QUEUES
    )
    workers = [start(off_by(request.param, wrong, tmp_path)), start(right)]
    pair = Pair(stage, Producer(sessions, discover_jobs(SAMPLE_JOBS)), workers)

    async def both_up() -> bool:
        return bool(await stage.value("SELECT count(*) FROM bulwark.worker") == 2)

    await until(both_up, "both workers are up")
    return pair


async def test_deferrals_backoffs_and_schedules_keep_to_one_clock(
    pair: Pair, stage: Stage, database_url: str, provoked: Provoked
) -> None:
    later = await pair.accept(ActOut(note="later"), run_at=await pair.now() + SOON)
    for queue in QUEUES:
        failing = await pair.accept(ActOut(then="fail"), attempts=2, queue=queue)
        job_id = await pair.accept(ActOut(note=queue, then="put_off", seconds=2), queue=queue)
        deferred = await pair.waits_as(job_id, "deferred")
        assert LATE > deferred["run_at"] - deferred["claimed_at"] > timedelta(seconds=2)
        await stage.value(ACT_NOW, job_id)
        for row in [await pair.claimed_again(deferred), await stage.becomes(failing, "failed")]:
            assert timedelta(0) <= row["claimed_at"] - row["run_at"] < LATE
        await stage.becomes(job_id, "succeeded")
        assert (await stage.row(failing))["attempt"] == 2
    row = await stage.becomes(later, "succeeded")
    assert timedelta(0) <= row["claimed_at"] - row["run_at"] < LATE

    early, late, slots, jobs, instants = (
        await stage.rows(
            "SELECT min(job.created_at - slot.at), max(job.created_at - slot.at), count(*), "
            "count(DISTINCT job_id), count(DISTINCT slot.at) "
            "FROM bulwark.slot JOIN bulwark.job ON job.id = job_id WHERE slot.schedule = 'watch'"
        )
    )[0]
    assert early >= timedelta(0)
    assert late < LATE
    assert slots == jobs == instants > 0
    await end_well(pair, stage, database_url, provoked, ["later", *QUEUES])


async def test_a_dead_worker_is_missed_by_one_clock_and_a_living_one_is_not(
    pair: Pair, stage: Stage, database_url: str, provoked: Provoked
) -> None:
    await stage.close_gate()
    held = [await pair.accept(ActOut(note=f"{at}", gate=True)) for at in range(4)]
    await stage.somebody_at_gate(len(held))
    dead = pair.workers.pop()
    dead.kill()
    seen_at = await stage.value("SELECT seen_at FROM bulwark.worker WHERE pid = $1", dead.pid)

    async def missed() -> Any:
        return await stage.value(
            "SELECT ended_at FROM bulwark.worker WHERE pid = $1 AND end_reason = 'lost'", dead.pid
        )

    ended_at = await until(missed, "the dead worker is missed")
    assert LOST_AFTER <= ended_at - seen_at < LATE
    await stage.open_gate()
    for job_id in held:
        await stage.becomes(job_id, "succeeded")
    await end_well(pair, stage, database_url, provoked, ["0", "1", "2", "3"])
    assert await stage.value("SELECT count(*) FROM bulwark.worker WHERE end_reason = 'lost'") == 1


async def test_a_message_that_a_plain_client_has_put_off_is_not_heard_early(
    pair: Pair, stage: Stage, client: ArqRedis
) -> None:
    begun_at = await pair.now()
    await client.enqueue_job("act_out", {"note": "put off by arq"}, _defer_by=SOON)

    async def done() -> Any:
        return await stage.value("SELECT started_at FROM bulwark.job WHERE arq_id IS NOT NULL")

    started_at = await until(done, "the message is heard")
    assert SOON <= started_at - begun_at < LATE


async def end_well(
    pair: Pair, stage: Stage, database_url: str, provoked: Provoked, notes: Sequence[str]
) -> None:
    """Let the workers end once nothing waits but what is scheduled, and look at what is left.

    Beside the notes given there is one of each scheduled job.
    """
    codes = [await asyncio.to_thread(one.terminate) for one in pair.workers]
    await stage.execute("DELETE FROM bulwark.job WHERE kind = 'keep_watch' AND state = 'queued'")
    watches = await stage.value("SELECT count(*) FROM bulwark.job WHERE kind = 'keep_watch'")
    wanted, found = (
        Counter({**dict.fromkeys(notes, 1), WATCH: watches}),
        Counter(await stage.notes()),
    )
    losses = await check_invariants(database_url)
    provoked(
        "clocks of two workers a minute apart",
        times=1,
        jobs=await stage.value("SELECT count(*) FROM bulwark.job"),
        lost=(wanted - found).total() + losses.lost,
        doubled=(found - wanted).total() + losses.doubled,
    )
    assert watches > 0
    assert losses.violations == []
    assert {*codes} == {0}
