"""A worker is paused past its limit, wakes when another has finished its job, and says so."""

import asyncio
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from db.steps import Step
from tests.chaos.conftest import Provoked
from tests.every_kind import Field, Task, every_task
from tests.invariants import Losses
from tests.stage import Stage
from tests.stepping import acting_at
from tests.workers import Start, WorkerProcess, environment_of, until

QUICK = {
    "beat_interval_s": "0.3",
    "lost_after_s": "1.0",
    "relay_interval_s": "0.1",
    "log_format": "json",
}
SESSIONS_OF = """
    SELECT state, query FROM pg_stat_activity JOIN bulwark.worker
        ON starts_with(application_name, 'bulwark ' || worker.id)
     WHERE worker.pid = $1 AND xact_start IS NOT NULL
"""
PLACES = {
    Step.RECEIPTED: ("insert_rows", "purge_deleted_rows"),
    Step.COPYING: ("spooled_import", "soft_delete_rows"),
    Step.APPLIED: ("transfer_heroes", "restore_archive"),
    Step.COMMITTING: ("insert_rows", "transfer_batch"),
}
"""Between two statements, inside COPY, before the ending, and before COMMIT."""


async def is_stopped(process: WorkerProcess) -> bool:
    """Whether the whole process stands still."""
    return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED


async def pause_at(
    step: Step, tasks: Sequence[Task], field: Field, start: Start, env: dict[str, str], folder: Path
) -> list[WorkerProcess]:
    """For each task a worker that stands still at the step, with its transaction open."""
    await field.seed(tasks)
    paused = []
    for task in tasks:
        await field.accept(task, queue=task.name)
        first = acting_at(step, task.nth(step), signal.SIGSTOP, folder / f"{task.name}.mark")
        paused.append(start({**env, "BULWARK_QUEUES": task.name}, first))
    for task, process in zip(tasks, paused, strict=True):
        await until(partial(is_stopped, process), f"{task.name} stands still at {step.name}")
        await require_place(step, field.stage, process)
    return paused


async def require_place(step: Step, stage: Stage, process: WorkerProcess) -> None:
    """PostgreSQL sees the transaction where it is meant to be held up."""
    open_ones = await stage.rows(SESSIONS_OF, process.pid)
    if step is Step.COPYING:
        assert [state for state, query in open_ones if query.startswith("COPY ")] == ["active"]
    else:
        assert "idle in transaction" in {state for state, _ in open_ones}


class Scene:
    """Workers on one database that are paused, and one that is not."""

    def __init__(self, field: Field, start: Start, env: dict[str, str], folder: Path) -> None:
        self._field = field
        self._start = start
        self._env = env
        self._folder = folder

    async def pause_and_wake(self, step: Step, tasks: Sequence[Task], **settings: str) -> Losses:
        """Let another worker finish all jobs while theirs are paused; then nothing may change."""
        field, env = self._field, {**self._env, **environment_of(**settings)}
        patient = {**env, "BULWARK_LOST_AFTER_S": "600"}  # so that none gives up another of them
        paused = await pause_at(step, tasks, field, self._start, patient, self._folder)
        other = self._start({**env, "BULWARK_QUEUES": ",".join(task.name for task in tasks)})

        async def all_done() -> bool:
            return sum([await field.left(task) for task in tasks]) == 0

        await until(all_done, "the other worker has finished the jobs")
        before = await field.everything()
        for process in paused:
            process.signal(signal.SIGCONT)
        for process in paused:
            await until(partial(has_begun_anew, field.stage, process), "the worker has begun anew")
            told = {line["event"]: line for line in process.events()}
            assert told["worker.lost"]["level"] == "error"
            assert "job.succeeded" not in told
        for process in [*paused, other]:
            assert await asyncio.to_thread(process.terminate) == 0
        assert await field.everything() == before
        for task in tasks:
            await field.check(task)
        return await field.is_left_in_order()


@pytest.fixture
def scene(field: Field, start: Start, env: dict[str, str], tmp_path: Path) -> Scene:
    return Scene(field, start, env, tmp_path)


@pytest.mark.parametrize("step", PLACES, ids=lambda step: step.name.lower())
async def test_a_worker_that_wakes_when_another_has_done_its_job_changes_nothing_and_says_so(
    step: Step, scene: Scene, field: Field, tmp_path: Path, provoked: Provoked
) -> None:
    tasks = [task for task in every_task(tmp_path) if task.name in PLACES[step]]
    losses = await scene.pause_and_wake(step, tasks, **QUICK, archive_folders=str(tmp_path))
    say(provoked, step, field, losses)


@pytest.mark.chaos
@pytest.mark.parametrize("step", PLACES, ids=lambda step: step.name.lower())
async def test_a_worker_with_a_job_of_any_kind_that_wakes_too_late_changes_nothing(
    step: Step, scene: Scene, field: Field, tmp_path: Path, provoked: Provoked
) -> None:
    tasks = [task for task in every_task(tmp_path) if step in task.steps]
    folder = str(tmp_path)
    losses = await scene.pause_and_wake(step, tasks, log_format="json", archive_folders=folder)
    say(provoked, step, field, losses)


def say(provoked: Provoked, step: Step, field: Field, losses: Losses) -> None:
    provoked(
        f"pause past the limit, {step.name.lower()}",
        times=len(field.jobs),
        jobs=sum(map(len, field.jobs.values())),
        lost=losses.lost,
        doubled=losses.doubled,
    )


async def has_begun_anew(stage: Stage, process: WorkerProcess) -> Any:
    rows = "SELECT count(*) FROM bulwark.worker WHERE pid = $1"
    return await stage.value(rows, process.pid) == 2
