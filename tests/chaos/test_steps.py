"""A worker is killed at each numbered step of each kind of job, and another one finishes it."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from signal import SIGKILL

import pytest

from db.steps import Step
from jobs import discover_jobs
from tests.chaos.conftest import Provoked
from tests.every_kind import SINGLE, Field, Task, every_task
from tests.invariants import Losses
from tests.stepping import acted_at_s, acting_at
from tests.workers import Start, WorkerProcess, environment, until

QUICK = {"beat_interval_s": "0.3", "lost_after_s": "1.0", "relay_interval_s": "0.1"}
RECOVERY_S = 25.0
AFTER_THE_END = {
    True: {Step.COMMITTED, Step.ENDED},
    False: {Step.ENDED},
}
"""The steps at which a job has ended for good, by whether it is one of a single transaction."""
ON_EVERY_SERVER = {Step.COPYING, Step.COMMITTING, Step.ENDING}
STEPS = [
    pytest.param(step, marks=() if step in ON_EVERY_SERVER else pytest.mark.once) for step in Step
]


class Scene:
    """Tasks, each in a queue of its own, and workers for them."""

    def __init__(self, field: Field, start: Start, urls: tuple[str, str], folder: Path) -> None:
        self.field = field
        self._start = start
        self._urls = urls
        self._folder = folder

    async def kill_at(self, step: Step, tasks: Sequence[Task], **settings: str) -> list[float]:
        """Seconds from each kill to the end of what it has cut off, after which all is checked."""
        await self.field.seed(tasks)
        for task in tasks:
            await self.field.accept(task, queue=task.name)
        patient = {**settings, "lost_after_s": "600"}  # so that none gives up another of them
        killed = [self._start(self._env([one], patient), self._first(step, one)) for one in tasks]

        async def all_dead() -> bool:
            return not any(one.running for one in killed)

        await until(all_dead, f"the workers die at {step.name}: {self._unhurt(tasks)}")
        cut_off = [task for task in tasks if not self.has_ended(step, task)]
        other = self._start(self._env(tasks, settings))
        recovery_s = await self._recovery_s(cut_off)
        await until(lambda: self._are_lost(killed), "the killed workers are declared lost")
        assert await asyncio.to_thread(other.terminate) == 0
        return recovery_s

    @staticmethod
    def has_ended(step: Step, task: Task) -> bool:
        """Whether the job had ended when its worker died; of a batch others may be left."""
        return step in AFTER_THE_END[task.steps == SINGLE] and len(task.payloads) < 2

    def _env(self, tasks: Sequence[Task], settings: dict[str, str]) -> dict[str, str]:
        queues = ",".join(task.name for task in tasks)
        folder = str(self._folder)
        return environment(*self._urls, queues=queues, archive_folders=folder, **settings)

    def _mark(self, task: Task) -> Path:
        return self._folder / f"{task.name}.mark"

    def _first(self, step: Step, task: Task) -> str:
        return acting_at(step, task.nth(step), SIGKILL, self._mark(task))

    def _unhurt(self, tasks: Sequence[Task]) -> list[str]:
        return [task.name for task in tasks if not self._mark(task).exists()]

    async def _are_lost(self, killed: Sequence[WorkerProcess]) -> bool:
        lost = "SELECT count(*) FROM bulwark.worker WHERE pid = ANY ($1) AND end_reason = 'lost'"
        pids = [one.pid for one in killed]
        return bool(await self.field.stage.value(lost, pids) == len(killed))

    async def _recovery_s(self, tasks: Sequence[Task]) -> list[float]:
        """Wait for the end of all; the seconds that each has taken since its worker was killed."""
        ended_s: dict[str, float] = {}

        async def all_ended() -> bool:
            for task in tasks:
                if task.name not in ended_s and await self.field.left(task) == 0:
                    ended_s[task.name] = time.monotonic()
            return len(ended_s) == len(tasks)

        await until(all_ended, f"all have ended: {[task.name for task in tasks]}")
        return [ended_s[one.name] - (acted_at_s(self._mark(one)) or 0) for one in tasks]


@pytest.fixture
def scene(field: Field, start: Start, database_url: str, redis_url: str, tmp_path: Path) -> Scene:
    return Scene(field, start, (database_url, redis_url), tmp_path)


async def check(field: Field, step: Step, tasks: Sequence[Task]) -> Losses:
    """Each effect once, each crash counted that had committed no rows, and nothing left behind."""
    for task in tasks:
        await field.check(task)
        crashes = await field.crashes(task)
        if len(field.jobs[task.name]) == 1:
            idle = not (Scene.has_ended(step, task) or await field.had_progress(task))
            assert crashes == {int(idle): 1}, task.name
        else:
            assert set(crashes) <= {0, 1}, task.name
            assert step >= Step.COMMITTED or crashes[1] > 1, "they did not go together"
    return await field.is_left_in_order()


def coming_by(step: Step, folder: Path) -> list[Task]:
    return [task for task in every_task(folder) if step in task.steps]


def a_few(step: Step, folder: Path) -> list[Task]:
    """Of each kind of job two steps, those that have had the fewest so far."""
    few, had = [], Counter[Step]()
    for task in every_task(folder):
        chosen = sorted(task.steps, key=lambda one: (had[one], one))[:2]
        had.update(chosen)
        if step in chosen:
            few.append(task)
    return few


def test_every_kind_of_job_is_killed_at_two_steps_at_least(tmp_path: Path) -> None:
    killed = Counter(task.name for step in Step for task in a_few(step, tmp_path))
    assert killed == {task.name: 2 for task in every_task(tmp_path)}
    assert {kind for task in every_task(tmp_path) for kind in task.kinds} == {*discover_jobs()}
    assert min(len(a_few(step, tmp_path)) for step in Step) > 1


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name.lower())
async def test_a_worker_killed_at_a_step_leaves_each_job_to_another_which_does_it_once(
    step: Step, scene: Scene, field: Field, tmp_path: Path, provoked: Provoked
) -> None:
    tasks = a_few(step, tmp_path)
    await scene.kill_at(step, tasks, **QUICK)
    losses = await check(field, step, tasks)
    say(provoked, step, field, losses, ())  # how long it takes is told of usual settings alone


@pytest.mark.chaos
@pytest.mark.parametrize("step", Step, ids=lambda step: step.name.lower())
async def test_every_kind_of_job_recovers_from_a_kill_at_a_step_in_time(
    step: Step, scene: Scene, field: Field, tmp_path: Path, provoked: Provoked
) -> None:
    tasks = coming_by(step, tmp_path)
    recovery_s = await scene.kill_at(step, tasks)
    losses = await check(field, step, tasks)
    assert max(recovery_s, default=0) < RECOVERY_S
    say(provoked, step, field, losses, recovery_s)


def say(
    provoked: Provoked, step: Step, field: Field, losses: Losses, recovery_s: Sequence[float]
) -> None:
    provoked(
        f"SIGKILL at step {step.value}, {step.name.lower()}",
        times=len(field.jobs),
        jobs=sum(map(len, field.jobs.values())),
        lost=losses.lost,
        doubled=losses.doubled,
        recovery_s=recovery_s,
    )
