"""Stock arq with its defaults, as a process of its own: the reference of pickup and idle."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from arq.connections import RedisSettings
from arq.typing import WorkerCoroutine
from arq.worker import func, run_worker

from tests.workers import ROOT

POLL_DELAY_S = 0.5
DATABASE = 1


async def mark_start(_ctx: dict[Any, Any]) -> int:
    """The instant on the monotonic clock; arq keeps it as the job's result."""
    return time.monotonic_ns()


def redis_settings(redis_url: str) -> RedisSettings:
    """A database of its own: Bulwark's workers read arq's default queue as well."""
    settings = RedisSettings.from_dsn(redis_url)
    settings.database = DATABASE
    return settings


@contextmanager
def stock_worker(redis_url: str) -> Iterator[int]:
    """The process id of a stock worker, which is killed afterwards."""
    command = [sys.executable, "-m", "tests.benchmarks.stock_arq", redis_url]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        try:
            yield process.pid
        finally:
            process.kill()


class WorkerSettings:
    """What arq's command line would be given."""

    functions = [func(cast(WorkerCoroutine, mark_start), name="mark_start")]
    poll_delay = POLL_DELAY_S


if __name__ == "__main__":
    run_worker(WorkerSettings, redis_settings=redis_settings(sys.argv[1]))  # type: ignore[arg-type]  # arq takes any class
