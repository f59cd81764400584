"""Where the time of one import goes: in the worker's threads, in its backends, or in waiting."""

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg

from tests.benchmarks.cpu import thread_cpu_s
from tests.benchmarks.imports import Contest, Contestants, importing_worker
from tests.benchmarks.measure import Tell
from tests.benchmarks.site import Site
from tests.workers import ROOT, environment, until
from worker.child import STOP_MARGIN_S

LOOK_INTERVAL_S = 0.01
LINES = 25
_LOOK = """
    SELECT pid, state, coalesce(wait_event_type || ':' || wait_event, 'on CPU'), left(query, 60)
      FROM pg_stat_activity
     WHERE application_name LIKE 'bulwark %-%-%-%-%' AND backend_type = 'client backend'
"""


async def run(site: Site, contest: Contest, tell: Tell) -> None:
    """Run ours twice: looked at from outside only, then with samples of the worker's stacks."""
    async with site.producer() as producer:
        async with importing_worker(site) as worker:
            before = thread_cpu_s(worker)
            async with _watched_backends(site) as states:
                timed = await Contestants(site, contest, producer, worker, tell).job()
            _tell_threads(before, thread_cpu_s(worker), worker, timed.wall_s, tell)
            _tell_states(states, tell)
        out = site.folder / "samples.json"
        async with _sampled_worker(site, out) as worker:
            await Contestants(site, contest, producer, worker, tell).job()
    _tell_samples(json.loads(out.read_text()), tell)


@asynccontextmanager
async def _watched_backends(site: Site) -> AsyncIterator[Counter[tuple[str, str]]]:
    """Look at what the worker's backends do, over and over, while the block lasts."""
    states: Counter[tuple[str, str]] = Counter()
    connection = await asyncpg.connect(site.postgres.url.replace("+asyncpg", ""))

    async def look() -> None:
        while True:
            for _, state, wait, query in await connection.fetch(_LOOK):
                if state != "idle":
                    states[f"{state}, {wait}", " ".join(query.split())] += 1
            states["looks", ""] += 1
            await asyncio.sleep(LOOK_INTERVAL_S)  # the interval of the samples

    task = asyncio.create_task(look())
    try:
        yield states
    finally:
        task.cancel()
        await asyncio.wait([task])
        await connection.close()


@asynccontextmanager
async def _sampled_worker(site: Site, out: Path) -> AsyncIterator[int]:
    """The process id of a worker that has written its samples when the block is left."""
    env = environment(site.postgres.url, site.valkey.url, import_folders=str(site.folder))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.benchmarks.sampled_worker", str(out)),
        env=env,
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    try:
        await until(lambda: site.registered(process.pid), "the sampled worker has started")
        yield process.pid
        process.terminate()
        await asyncio.wait_for(process.wait(), STOP_MARGIN_S)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _tell_threads(
    before: Mapping[int, float], after: Mapping[int, float], pid: int, wall_s: float, tell: Tell
) -> None:
    used = {one: cpu_s - before.get(one, 0.0) for one, cpu_s in after.items()}
    loop_s, others_s = used.pop(pid), sum(used.values())
    tell(
        f"worker: event loop {loop_s:.2f} s CPU, other threads {others_s:.2f} s, "
        f"of {wall_s:.2f} s on the clock"
    )


def _tell_states(states: Counter[tuple[str, str]], tell: Tell) -> None:
    """Shares of the looks; backends that work at the same time sum to more than all."""
    looks = states.pop(("looks", ""))
    tell("backends: share of the looks, what, statement")
    for (state, query), count in states.most_common(LINES):
        tell(f"  {count / looks:4.0%}  {state:45} {query}")


def _tell_samples(found: dict[str, Any], tell: Tell) -> None:
    """How often each was seen, and how long a third thread had to wait for its turn."""
    tell(
        f"worker: a further thread waited for the interpreter lock {found['late_s']:.2f} s in all, "
        f"and {1000 * found['latest_s']:.0f} ms at most"
    )
    for title, key in (("functions with what they call", "inclusive"), ("lines", "lines")):
        tell(f"worker: samples of {title}")
        for place, count in found[key][:LINES]:
            tell(f"  {count:6,}  {place}")
