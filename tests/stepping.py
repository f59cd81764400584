"""What a worker process of a test runs first, to die or to pause at one of its numbered steps."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from db import steps
from db.steps import Step


def act_at(step: Step, nth: int, number: signal.Signals, mark: str) -> None:
    """Let this process send itself the signal when it reaches the step for the nth time.

    That happens once for all processes that share the mark, a file that then says when.
    """
    times = 0

    def reached(at: Step) -> None:
        nonlocal times
        times += at is step
        if at is step and times == nth and _is_first(mark):
            signal.raise_signal(number)

    setattr(steps, "reached", reached)  # noqa: B010 - a function that is replaced on purpose


def _is_first(mark: str) -> bool:
    with suppress(FileExistsError):
        file = os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        os.write(file, str(time.monotonic()).encode())
        os.close(file)
        return True
    return False


def acting_at(step: Step, nth: int, number: signal.Signals, mark: Path) -> str:
    """The same as a line of Python, for another process."""
    return (
        "from tests.stepping import act_at, signal, Step; "
        f"act_at(Step({step.value}), {nth}, signal.Signals({number.value}), {str(mark)!r})\n"
    )


def acted_at_s(mark: Path) -> float | None:
    """When a process did it, on the monotonic clock of this machine."""
    return float(mark.read_text()) if mark.exists() and mark.read_text() else None
