"""Processes whose clock is wrong."""

from collections.abc import Mapping
from pathlib import Path

STRANGE_CLOCK = """
import datetime as module
import time

OFF_S = {off_s}
real, real_time, real_time_ns = module.datetime, time.time, time.time_ns


class AnyDatetime(type):
    def __instancecheck__(cls, one):
        return isinstance(one, real)


class Strange(real, metaclass=AnyDatetime):
    @classmethod
    def now(cls, tz=None):
        return real.now(tz) + module.timedelta(seconds=OFF_S)

    @classmethod
    def utcnow(cls):
        return cls.now(module.UTC).replace(tzinfo=None)


module.datetime = Strange
time.time = lambda: real_time() + OFF_S
time.time_ns = lambda: real_time_ns() + OFF_S * 10**9
"""
"""Python imports a module named sitecustomize before any other: this one puts its clock wrong."""


def off_by(off_s: int, env: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The environment of a process whose clock is ahead by so many seconds."""
    place = folder / f"clock_{off_s}"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(STRANGE_CLOCK.format(off_s=off_s))
    return {**env, "PYTHONPATH": f"{place}:{env['PYTHONPATH']}"}
