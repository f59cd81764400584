"""One server process from a wheel: started, asked until it answers, and stopped."""

import importlib.util
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, NoReturn, TypeVar

from worker.embedded.home import Home

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.02
_LOG_LINES = 10


class EmbeddedServerError(Exception):
    """An embedded server cannot be started or stopped."""


class Server(ABC):
    """One server process, whose files are in a folder of its own."""

    name: ClassVar[str]

    def __init__(self, home: Home) -> None:
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


_AnyServer = TypeVar("_AnyServer", bound=Server)


@contextmanager
def running(server: _AnyServer) -> Iterator[_AnyServer]:
    try:
        server.start()
        yield server
    finally:
        server.stop()


def program(package: str, pattern: str) -> Path:
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
