"""Telling once that a server is away and once that it is back, however often it is tried."""

from typing import Any

from structlog.typing import FilteringBoundLogger

FIRST_WAIT_S = 0.1
MOST_WAIT_S = 1.5
"""How late, at most, it is noticed that the server is back."""


class Outage:
    """What one part of a worker knows about a server; `lost` and `back` are its events."""

    def __init__(self, log: FilteringBoundLogger, lost: str, back: str, **fields: Any) -> None:
        self._log = log.bind(**fields)
        self._lost = lost
        self._back = back
        self._failures = 0

    @property
    def lasts(self) -> bool:
        return self._failures > 0

    def fail(self, reason: str, **fields: Any) -> float:
        """The server did not answer; returns how long to wait before the next try."""
        if not self.lasts:
            self._log.warning(self._lost, reason=reason, **fields)
        self._failures += 1
        return float(min(MOST_WAIT_S, FIRST_WAIT_S * 2 ** min(self._failures - 1, 10)))

    def end(self) -> None:
        """The server has answered."""
        if self.lasts:
            self._log.info(self._back)
        self._failures = 0
