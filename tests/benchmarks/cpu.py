"""CPU seconds that processes have used, as the operating system counts them."""

import os
from collections.abc import Collection

import psutil


def process_cpu_s(pid: int) -> float:
    """Of one process with all its threads."""
    return _cpu_s(psutil.Process(pid))


def tree_cpu_s(pid: int, *, without: Collection[int] = ()) -> float:
    """Of a process and its children, also those that have ended."""
    root = psutil.Process(pid)
    while True:
        before = root.cpu_times()
        children_s = sum(_cpu_s(child) for child in root.children() if child.pid not in without)
        used = root.cpu_times()
        ended_s = used.children_user + used.children_system
        if ended_s == before.children_user + before.children_system:  # none moved meanwhile
            return used.user + used.system + ended_s + children_s


def _cpu_s(process: psutil.Process) -> float:
    try:
        used = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return used.user + used.system


def thread_cpu_s(pid: int) -> dict[int, float]:
    """Of each thread of a process, by its id; the main thread has the id of the process."""
    return {one.id: one.user_time + one.system_time for one in psutil.Process(pid).threads()}


def load_1min() -> float:
    """How many processes wanted a CPU in the last minute: the machine should have had no other."""
    return os.getloadavg()[0]
