"""A worker whose stacks are sampled while it works, for --profile; its argument is the output.

Native code counts for the line of Python that called it, and a thread that waits for the
interpreter lock looks as if it worked; so the shares tell where to look, not what is gained.
"""

import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType

from worker.main import run_worker
from worker.settings import load_settings

SAMPLE_INTERVAL_S = 0.005
_ROOT = str(Path(__file__).resolve().parents[2])
_WAITING = {"select", "wait", "_worker", "_sample"}
"""The innermost functions of threads that have nothing to do."""


class Sampler:
    """Counts, for each of our functions, the samples that found it on a stack that works."""

    def __init__(self) -> None:
        self.lates_s: list[float] = []
        """How long the sampler had to wait each time: for the interpreter lock, above all."""
        self.inclusive: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.is_set():
            asleep_s = time.monotonic()
            time.sleep(SAMPLE_INTERVAL_S)  # the interval of the samples
            self.lates_s.append(time.monotonic() - asleep_s - SAMPLE_INTERVAL_S)
            for frame in sys._current_frames().values():
                if frame.f_code.co_name not in _WAITING:
                    self._count(frame)

    def _count(self, innermost: FrameType) -> None:
        seen: set[str] = set()
        frame: FrameType | None = innermost
        while frame is not None:
            if (place := _place(frame)) is not None:
                if not seen:
                    self.lines[f"{place}:{frame.f_lineno}"] += 1
                seen.add(place)
            frame = frame.f_back
        self.inclusive.update(seen)


def _place(frame: FrameType) -> str | None:
    """Module and function, if it is one of ours."""
    code = frame.f_code
    if not code.co_filename.startswith(_ROOT) or "site-packages" in code.co_filename:
        return None
    return f"{frame.f_globals.get('__name__')}.{code.co_qualname}"


if __name__ == "__main__":
    sampler = Sampler()
    sampler.start()
    try:
        run_worker(load_settings())
    finally:
        sampler.stop()
        found = {
            "late_s": sum(sampler.lates_s),
            "latest_s": max(sampler.lates_s),
            "inclusive": sampler.inclusive.most_common(30),
            "lines": sampler.lines.most_common(30),
        }
        Path(sys.argv[1]).write_text(json.dumps(found))
