"""A PgBouncer in transaction mode before the tests' PostgreSQL, where the program is installed."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from sqlalchemy import URL, make_url
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from worker.embedded import free_port

_SETTINGS = """\
[databases]
{database} = {server}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
max_client_conn = 200
application_name_add_host = 1
default_pool_size = {pool_size}
"""
_START_TIMEOUT_S = 30.0
_POLL_S = 0.02


class PgBouncer:
    """One process, at a port that stays the same when it is started again."""

    def __init__(self, program: str, database_url: str, pool_size: int, folder: Path) -> None:
        behind = make_url(database_url)
        self._port = free_port()
        self._command = [program, str(folder / "pgbouncer.ini"), *_unprivileged()]
        self._log = folder / "pgbouncer.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = behind.set(
            host="127.0.0.1", port=self._port, query={}, username="anybody", password=None
        ).render_as_string(hide_password=False)
        (folder / "pgbouncer.ini").write_text(
            _SETTINGS.format(
                database=behind.database,
                server=_server_of(behind),
                port=self._port,
                pool_size=pool_size,
            )
        )

    def start(self) -> None:
        """Start it and return when it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        asking = Retrying(
            retry=retry_if_exception_type(OSError),
            stop=stop_after_delay(_START_TIMEOUT_S),
            wait=wait_fixed(_POLL_S),  # it gives no sign when it is ready; it is asked
            reraise=True,
        )
        asking(lambda: socket.create_connection(("127.0.0.1", self._port)).close())

    def kill(self) -> None:
        """End it as a crash would: its clients and its servers lose their connections."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def pgbouncer(database_url: str, *, pool_size: int) -> Iterator[PgBouncer]:
    """Run one while the block lasts; the test is skipped where there is no such program."""
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        pytest.skip("PgBouncer is not installed (Debian: apt-get install pgbouncer)")
    folder = Path(tempfile.mkdtemp(prefix="bulwark-"))
    folder.chmod(0o755)  # it runs as another user where the tests are root's
    bouncer = PgBouncer(program, database_url, pool_size, folder)
    try:
        bouncer.start()
        yield bouncer
    finally:
        bouncer.kill()
        with suppress(OSError):
            shutil.rmtree(folder)


def _unprivileged() -> list[str]:
    """PgBouncer refuses to run as root."""
    return ["-u", "nobody"] if os.geteuid() == 0 else []


def _server_of(url: URL) -> str:
    """Where PostgreSQL is, in PgBouncer's words."""
    found = {
        "host": url.host or url.query["host"],
        "port": url.port or url.query.get("port", 5432),
        "dbname": url.database,
        "user": url.username,
        "password": url.password,
    }
    return " ".join(f"{name}={value}" for name, value in found.items() if value)
