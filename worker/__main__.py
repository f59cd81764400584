"""The command `bulwark`, and `python -m worker`: the command line, which obeys SIGTERM at once.

Everything else is imported after that: it takes a second, in which a container may be stopped.
"""

import os
import signal
import sys
from types import FrameType

FIRST_PROCESS = 1
"""In a container it is the command itself, and no signal ends it that it does not handle."""


def run() -> None:
    """Run the command line on the words that the process was started with."""
    obey_sigterm(is_worker=sys.argv[1:2] == ["worker"])
    try:
        from worker.cli import app
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    app()


def obey_sigterm(*, is_worker: bool) -> None:
    """End by SIGTERM, until the command has its own way to: a worker in order, others as usual.

    Nothing is tidied up, as nothing is when a signal ends a process by itself: PostgreSQL rolls
    back what is open. A worker holds no job yet.
    """
    code = 0 if is_worker else 128 + signal.SIGTERM  # as a shell calls an end by a signal

    def end(_number: int, _frame: FrameType | None) -> None:
        os._exit(code)

    if is_worker or os.getpid() == FIRST_PROCESS:
        signal.signal(signal.SIGTERM, end)


if __name__ == "__main__":
    run()
