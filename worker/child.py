"""A worker as a process of its own, which ends with the process that started it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

STOP_MARGIN_S = 10.0
_PACKAGES = Path(__file__).resolve().parent.parent


@contextmanager
def worker_process(
    environment: Mapping[str, str],
    *,
    pid_file: Path,
    folder: Path | None = None,
    log: IO[bytes] | None = None,
    stop_within_s: float | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker while the block lasts; afterwards it is asked to stop, or killed at once.

    A pid file in a folder beside those of embedded servers lets their guard end the worker,
    should this process be killed.
    """
    pid_file.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "worker.cli", "worker"],
        env=_with_packages(environment),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,  # Ctrl-C in a terminal is for the caller alone
    )
    try:
        pid_file.write_text(f"{process.pid}\n")
        yield process
    finally:
        _end(process, stop_within_s)
        pid_file.unlink(missing_ok=True)


def _end(process: subprocess.Popen[bytes], stop_within_s: float | None) -> None:
    try:
        if stop_within_s is not None:
            process.send_signal(signal.SIGTERM)
            process.wait(stop_within_s)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()


def _with_packages(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment, in which the packages are found from any folder."""
    paths = [str(_PACKAGES), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)}


@contextmanager
def stopping_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, so that everything is tidied up."""
    signals = (signal.SIGTERM, signal.SIGHUP)
    before = {one: signal.signal(one, _as_ctrl_c) for one in signals}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """Do what SIGINT would do now, where asyncio runs: cancel its main task.

    A KeyboardInterrupt raised wherever the program happens to be would be lost in a finalizer. It
    is all there is where SIGINT is ignored, as in the background of a shell.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        handler = signal.default_int_handler
    handler(number, frame)
