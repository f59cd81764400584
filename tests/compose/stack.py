"""A compose project of the tests' own, seen from outside, whose containers can be crashed."""

import asyncio
import json
import os
import random
import secrets
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import cached_property
from typing import Any
from urllib.parse import quote

import asyncpg

from tests.workers import ROOT, until

IMAGE = "bulwark-worker:smoke"
SERVICES = ("postgres", "redis", "worker")
ODD_PASSWORD = "p@ss/w%41 :'\"$x#?&\\"
KILLER_LIVES_S = "3600"
NO_ENV_FILE = ("--env-file", str(ROOT / "tests" / "compose" / "empty.env"))
"""The checkout's own .env is for those who use it."""
OF_STORES = ("AWS_", "GOOGLE_", "AZURE_")
_UP_TIMEOUT_S = 300.0


class ComposeFailed(Exception):
    """A command of Docker's did not end as it should; the message is what it said."""


class Stack:
    """The containers of one project."""

    def __init__(self, **settings: str) -> None:
        self.project = f"bulwark-smoke-{secrets.token_hex(4)}"
        self.password = ODD_PASSWORD + secrets.token_hex(4)
        not_mine = ("BULWARK_", *OF_STORES)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(not_mine)}
        self._last_database_url = "postgresql://127.0.0.1:1/none"
        self._env = kept | {
            "POSTGRES_PASSWORD": self.password,
            "REDIS_PASSWORD": self.password,
            "WORKER_IMAGE": IMAGE,
            **settings,
        }

    def up(self, workers: int = 1) -> None:
        """Start everything and wait until all of it is healthy."""
        self.compose("up", "--detach", "--scale", f"worker={workers}")

    def down(self, *, volumes: bool = False) -> None:
        self.compose("down", "--timeout", "60", *(["--volumes"] if volumes else []))

    def compose(self, *words: str, stdin: bytes | None = None) -> str:
        """Run a command of compose. Raises ComposeFailed."""
        options = ["--project-name", self.project, *NO_ENV_FILE]
        return run([*compose_program(), *options, *words], self._env, stdin)

    def bulwark(self, *words: str, stdin: bytes | None = None) -> str:
        """Run a command of Bulwark's in a container of its own."""
        return self.compose("run", "--rm", "-T", "worker", "bulwark", *words, stdin=stdin)

    def accept(self, *words: str, stdin: bytes | None = None) -> str:
        """The id of the job that a command of Bulwark's enqueues."""
        job_id: str = json.loads(self.bulwark(*words, "--json", stdin=stdin))["job_id"]
        return job_id

    def containers(self, service: str) -> list[str]:
        """The ids of a service's containers that run, without those of `bulwark`.

        There are none when one goes while compose looks, as happens while everything starts.
        """
        try:
            return self.compose("ps", "--quiet", service).split()
        except ComposeFailed:
            return []

    def crash(self, container: str) -> bool:
        """Kill a container's main process as a crash would; tell whether it was running.

        `docker kill` would not do: what it ends is not started again.
        """
        pid = inspect(container, "{{.State.Pid}}")
        if pid == "0":
            return False
        try:
            run(["docker", "exec", self.killer, "sh", "-c", f"kill -9 {pid}"], self._env)
        except ComposeFailed:
            return False  # it has ended meanwhile
        return True

    def crash_one(self, service: str, chance: random.Random) -> bool:
        """Crash a container of the service that is drawn; tell whether one was running."""
        containers = self.containers(service)
        return bool(containers) and self.crash(chance.choice(containers))

    def port(self, service: str, port: int) -> str:
        """Where a port of the service is on this machine."""
        return self.compose("port", service, str(port)).strip()

    @property
    def database_url(self) -> str:
        """As a producer on this machine would give it; another one after each restart."""
        address = self.port("postgres", 5432)
        return f"postgresql+asyncpg://bulwark:{quote(self.password, safe='')}@{address}/bulwark"

    @property
    def redis_url(self) -> str:
        return f"redis://:{quote(self.password, safe='')}@{self.port('redis', 6379)}/0"

    @cached_property
    def killer(self) -> str:
        """The id of a container that may send signals to the processes of all others."""
        options = ["--detach", "--rm", "--init", "--pid=host", "--user=0", "--network=none"]
        words = ["docker", "run", *options, "--no-healthcheck", IMAGE, "sleep", KILLER_LIVES_S]
        return run(words, self._env).strip()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection]:
        """A look at the database."""
        try:
            connection = await asyncpg.connect(plain(self._last_database_url))
        except (OSError, asyncpg.PostgresError):
            self._last_database_url = await asyncio.to_thread(lambda: self.database_url)
            connection = await asyncpg.connect(plain(self._last_database_url))
        try:
            yield connection
        finally:
            await connection.close()

    async def value(self, sql: str, *arguments: object) -> Any:
        async with self.connection() as connection:
            return await connection.fetchval(sql, *arguments)

    async def seen(self, sql: str, what: str, *arguments: object, timeout_s: float = 180.0) -> Any:
        """The value that the query gives, once it gives a true one; PostgreSQL may be away."""

        async def look() -> Any:
            try:
                return await self.value(sql, *arguments)
            except (OSError, asyncpg.PostgresError, ComposeFailed):
                return None

        return await until(look, what, timeout_s)


@contextmanager
def running_stack(**settings: str) -> Iterator[Stack]:
    """A project without anything in it yet; nothing of it is left afterwards."""
    stack = Stack(**settings)
    with ExitStack() as ending:
        ending.callback(run, ["docker", "kill", stack.killer], os.environ)
        ending.callback(stack.down, volumes=True)
        yield stack


def plain(url: str) -> str:
    """As asyncpg wants it."""
    return url.replace("+asyncpg", "")


def build_image() -> None:
    """Build the image that the tests use, from this checkout."""
    env = dict(os.environ)
    words = ["docker", "build", "--quiet", "--tag", IMAGE]
    if network := env.get("BUILD_NETWORK"):
        words += ["--network", network]
    if base := env.get("PYTHON_IMAGE"):
        words += ["--build-arg", f"PYTHON_IMAGE={base}"]
    run([*words, str(ROOT)], env)


def compose_program() -> list[str]:
    """The second version is a plugin of `docker`, the first a program of its own."""
    plugin = ["docker", "compose"]
    found = subprocess.run([*plugin, "version"], capture_output=True, check=False)
    return plugin if found.returncode == 0 else ["docker-compose"]


def inspect(name: str, template: str) -> str:
    """What Docker knows of a container or an image."""
    return run(["docker", "inspect", "--format", template, name], dict(os.environ)).strip()


def run(words: Sequence[str], env: Mapping[str, str], stdin: bytes | None = None) -> str:
    """Run a program in the checkout and return what it printed. Raises ComposeFailed."""
    done = subprocess.run(
        list(words),
        env=dict(env),
        cwd=ROOT,
        input=stdin or b"",
        capture_output=True,
        timeout=_UP_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise ComposeFailed(f"{' '.join(words)} ended with {done.returncode}: {said}")
    return done.stdout.decode()
