"""A bulk job on a file against the same done by psql: for insert, upsert and update."""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from jobs._declaration import Payload
from jobs._producer import Producer
from tests.benchmarks.cpu import process_cpu_s
from tests.benchmarks.measure import BenchmarkFailed, Report, Target, Tell
from tests.benchmarks.pairs import Pair, alternate, median_figure
from tests.benchmarks.site import Site


@dataclass(frozen=True)
class Contest:
    """What is done in both ways, and how the table is made ready before each.

    `rows` are those of the file, `rows_left` those of the table afterwards.
    """

    rows: int
    rows_left: int
    payload: Payload
    commands: Sequence[str]
    prepare: Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Timed:
    """One run; `job_s` is from the job's start to its end as its row says, without the pick-up."""

    rows: int
    wall_s: float
    backend_cpu_s: float
    worker_cpu_s: float = 0.0
    job_s: float | None = None

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.wall_s

    def __str__(self) -> str:
        parts = [f"{self.rows_per_s:9,.0f} rows/s in {self.wall_s:.2f} s"]
        if self.job_s is not None:
            parts += [f"job {self.job_s:.2f} s", f"worker CPU {self.worker_cpu_s:.2f} s"]
        return ", ".join([*parts, f"backend CPU {self.backend_cpu_s:.2f} s"])


async def compare(
    site: Site, contest: Contest, pairs: int, target_ratio: float, tell: Tell
) -> Report:
    """Time both ways in turn. Raises BenchmarkFailed when they do not leave the same rows."""
    async with site.producer() as producer, importing_worker(site) as worker:
        contestants = Contestants(site, contest, producer, worker, tell)
        done = await alternate(pairs, contestants.psql, contestants.job)
    target = Target("ratio", "at least", target_ratio)
    speed = median_figure(
        done, lambda run: run.rows_per_s, name="speed", unit="rows/s", target=target
    )
    return Report([speed], [_as_json(pair) for pair in done], _facts(contest, done))


def importing_worker(site: Site) -> Any:
    """A worker that may read the site's files where they are."""
    return site.worker(import_folders=str(site.folder))


@dataclass
class Contestants:
    """Runs one or the other way, on a table made ready, and looks at what it left."""

    site: Site
    contest: Contest
    producer: Producer
    worker_pid: int
    tell: Tell
    left: tuple[int, ...] | None = None

    async def psql(self) -> Timed:
        await self.contest.prepare()
        cpu_s, start_s = await self.site.backend_cpu_s(), time.monotonic()
        await self.site.psql(*self.contest.commands)
        wall_s = time.monotonic() - start_s
        used_s = await self.site.backend_cpu_s() - cpu_s
        return await self._checked("psql", Timed(self.contest.rows, wall_s, used_s))

    async def job(self) -> Timed:
        await self.contest.prepare()
        cpu_s, worker_s = await self.site.backend_cpu_s(), process_cpu_s(self.worker_pid)
        accepted = await self.producer.enqueue(self.contest.payload)
        start_s = time.monotonic()
        row = await self.site.ended(accepted.job_id)
        wall_s = time.monotonic() - start_s
        if row["state"] != "succeeded":
            raise BenchmarkFailed(f"the job is {row['state']} ({row['reason']}): {row['error']}")
        return await self._checked(
            "ours",
            Timed(
                self.contest.rows,
                wall_s,
                await self.site.backend_cpu_s() - cpu_s,
                process_cpu_s(self.worker_pid) - worker_s,
                (row["finished_at"] - row["started_at"]).total_seconds(),
            ),
        )

    async def _checked(self, who: str, timed: Timed) -> Timed:
        """Compare what the run left with the run before, and say how long it took."""
        found = await self.site.connection.fetchrow(
            "SELECT count(*), sum(age), sum(hashtext(name)), sum(version) FROM hero"
        )
        left = tuple(found)
        if left[0] != self.contest.rows_left or left != (self.left or left):
            raise BenchmarkFailed(f"{who} left {left}, the run before {self.left}")
        self.left = left
        self.tell(f"  {who:5}{timed}")
        return timed


def _facts(contest: Contest, done: Sequence[Pair[Timed]]) -> dict[str, float]:
    """What tells whether the worker, the server or the waiting between them is the limit."""
    return {
        "rows": contest.rows,
        "worker_cpu_s": median(pair.ours.worker_cpu_s for pair in done),
        "backend_cpu_s": median(pair.ours.backend_cpu_s for pair in done),
        "reference_backend_cpu_s": median(pair.reference.backend_cpu_s for pair in done),
    }


def _as_json(pair: Pair[Timed]) -> dict[str, Any]:
    return {"ours": asdict(pair.ours), "reference": asdict(pair.reference)}
