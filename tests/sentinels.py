"""A Valkey, its replica and three sentinels, all with passwords, on free ports of loopback."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import redis
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from worker.embedded import free_port, valkey_program

MASTER = "mymaster"
SENTINELS = 3
_PASSWORD, _SENTINELS_PASSWORD = "of data", "of sentinels"
_DATA = f"""\
bind 127.0.0.1
port {{port}}
save ""
appendonly no
maxmemory-policy noeviction
repl-diskless-sync-delay 0
requirepass "{_PASSWORD}"
primaryauth "{_PASSWORD}"
"""
_SENTINEL = f"""\
bind 127.0.0.1
port {{port}}
requirepass "{_SENTINELS_PASSWORD}"
sentinel sentinel-pass "{_SENTINELS_PASSWORD}"
sentinel monitor {MASTER} 127.0.0.1 {{master}} 2
sentinel auth-pass {MASTER} "{_PASSWORD}"
sentinel down-after-milliseconds {MASTER} 500
sentinel failover-timeout {MASTER} 1000
"""
_POLL_S = 0.05
_TIMEOUT_S = 240.0
"""Sentinels that were given no time for 2 s do nothing for half a minute (TILT)."""


Question = Callable[[redis.Redis], bool]


class Node:
    """One server; its configuration, in which sentinels note what they learn, outlives it."""

    def __init__(self, config: str, folder: Path, password: str, *words: str) -> None:
        self.port = free_port()
        self._password = password
        folder.mkdir()
        self._file = folder / "valkey.conf"
        self._file.write_text(config.replace("{port}", str(self.port)))
        self._words = words
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and return when it answers."""
        folder = self._file.parent
        command = [str(valkey_program()), str(self._file), *self._words]
        with (folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        self.until(lambda client: bool(client.ping()))

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def until(self, question: Question) -> None:
        """Ask it until the answer is yes."""

        def answer() -> None:
            assert question(client)

        with redis.Redis(port=self.port, password=self._password, socket_timeout=5) as client:
            asking = Retrying(
                retry=retry_if_exception_type((redis.RedisError, AssertionError)),
                stop=stop_after_delay(_TIMEOUT_S),
                wait=wait_fixed(_POLL_S),  # servers tell nobody what they have become; one asks
                reraise=True,
            )
            asking(answer)

    def becomes_replica(self) -> None:
        """Return once it has all that its master has."""
        self.until(lambda client: _replication(client).get("master_link_status") == "up")

    def becomes_master(self) -> None:
        self.until(lambda client: _replication(client)["role"] == "master")


class Fleet:
    """Two servers, one of which is the master, and the sentinels that see to it."""

    def __init__(self, folder: Path) -> None:
        self.first = Node(_DATA, folder / "first", _PASSWORD)
        replica = f"{_DATA}replicaof 127.0.0.1 {self.first.port}\n"
        self.second = Node(replica, folder / "second", _PASSWORD)
        config = _SENTINEL.replace("{master}", str(self.first.port))
        self._sentinels = [
            Node(config, folder / f"sentinel-{n}", _SENTINELS_PASSWORD, "--sentinel")
            for n in range(SENTINELS)
        ]
        addresses = ",".join(f"127.0.0.1:{one.port}" for one in self._sentinels)
        self.url = (
            f"redis+sentinel://:{quote(_PASSWORD)}@{addresses}/{MASTER}/1"
            f"?sentinel_password={quote(_SENTINELS_PASSWORD)}"
        )

    def start(self) -> None:
        """Return when the replica has all, and each sentinel knows of all others."""
        self.first.start()
        self.second.start()
        self.second.becomes_replica()
        for one in self._sentinels:
            one.start()
        for one in self._sentinels:
            one.until(_knows_all)

    def kill(self) -> None:
        for one in (*self._sentinels, self.first, self.second):
            one.kill()

    def kill_a_sentinel(self) -> None:
        """The one that is asked first."""
        self._sentinels[0].kill()

    def begin_anew_as_replica(self, node: Node) -> None:
        """Start a killed master again and return when a sentinel has made it a replica."""
        node.start()
        node.becomes_replica()


@contextmanager
def sentinel_fleet(folder: Path) -> Iterator[Fleet]:
    """Run one while the block lasts."""
    fleet = Fleet(folder)
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.kill()


def _replication(client: redis.Redis) -> dict[str, Any]:
    return cast("dict[str, Any]", client.info("replication"))


def _knows_all(client: redis.Redis) -> bool:
    state = client.sentinel_masters()[MASTER]  # type: ignore[no-untyped-call]  # redis-py's
    return bool(state["num-other-sentinels"] == SENTINELS - 1 and state["num-slaves"] == 1)
