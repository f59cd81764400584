"""An event loop beside the caller's, for callers that block, also where one runs already."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Beside:
    """One event loop in a thread of its own, so that connections may be kept between two calls."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "beside")
        self._runner = asyncio.Runner()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Block until it has ended."""
        return self._thread.submit(self._runner.run, work).result()

    def close(self) -> None:
        self._thread.submit(self._runner.close).result()
        self._thread.shutdown()
