"""Worker processes of the tests' own, and waiting for what they do."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from redis.asyncio import Redis

from worker.mark import MARK_LEASE_S, mark_key

ROOT = Path(__file__).parents[1]
_RUN = "from worker.main import run_worker; from worker.settings import load_settings; "
NO_SEALING = '{"audit_sealing": {"enabled": false}}'
T = TypeVar("T")


def environment(database_url: str, redis_url: str, **settings: str) -> dict[str, str]:
    """The environment of a process that works on these servers, without any other setting.

    The one schedule that is on by itself is off, lest it fires in the midst of some test.
    """
    given = {"schedules": NO_SEALING, **settings}
    return environment_of(database_url=database_url, redis_url=redis_url, **given)


def environment_of(**settings: str) -> dict[str, str]:
    """The environment of a process of the project that has these settings alone."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("BULWARK_")}
    given = {f"BULWARK_{name.upper()}": value for name, value in settings.items()}
    return {**inherited, "PYTHONPATH": str(ROOT), **given}


def run_python(
    *words: str, env: Mapping[str, str], folder: Path = ROOT, timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run Python until it ends by itself, and return what it said."""
    return subprocess.run(
        [sys.executable, *words],
        env=dict(env),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


run_bulwark = partial(run_python, "-m", "worker.cli")
"""The command line in a process of its own."""


class WorkerProcess:
    """A real worker in a process of its own, which may run some other Python first."""

    def __init__(self, env: Mapping[str, str], log: Path, first: str = "") -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", first + _RUN + "run_worker(load_settings())"],
                env=dict(env),
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.pid = self._process.pid

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it as a crash would, and bury it."""
        self._process.kill()
        self._process.wait()

    def terminate(self, timeout_s: float = 30.0) -> int:
        """Ask it to stop and return its exit code."""
        self._process.terminate()
        return self._process.wait(timeout_s)

    def events(self) -> list[dict[str, Any]]:
        """What it has logged as JSON."""
        found = []
        for line in self.log.read_text().splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
        return found

    def told(self) -> list[str]:
        """The names of what it has logged, if that is JSON."""
        return [one["event"] for one in self.events()]

    @property
    def running(self) -> bool:
        return self._process.poll() is None


class Start(Protocol):
    """Starts a worker on these settings."""

    def __call__(self, env: Mapping[str, str], first: str = "") -> WorkerProcess: ...


@contextmanager
def workers(folder: Path) -> Iterator[Start]:
    """Starts workers; all that are left at the end are killed."""
    started: list[WorkerProcess] = []

    def start(env: Mapping[str, str], first: str = "") -> WorkerProcess:
        started.append(WorkerProcess(env, folder / f"worker-{len(started)}.log", first))
        return started[-1]

    try:
        yield start
    finally:
        for one in started:
            if one.running:
                one.signal(signal.SIGCONT)
                one.kill()


async def until(
    question: Callable[[], Awaitable[T | None]], what: str, timeout_s: float = 90.0
) -> T:
    """Ask until there is an answer; when there is none in time, fail with what was awaited."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        answer = await question()
        if answer:
            return answer
        assert time.monotonic() < deadline_s, f"within {timeout_s} s it was not seen that {what}"
        await asyncio.sleep(0.01)  # the pause between two questions, not a wait for an effect


async def let_redis_be_known(env: dict[str, str], start: Start) -> None:
    """Later workers do not ring all jobs again: whom that keeps locked is done alone."""
    first = start(env)

    async def is_marked() -> bool:
        async with Redis.from_url(env["BULWARK_REDIS_URL"]) as client:
            return bool(await client.ttl(await mark_key(client)) > MARK_LEASE_S)

    await until(is_marked, "the relay has marked Redis for good")
    assert first.terminate() == 0
