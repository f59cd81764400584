"""How many rows to take at once, so that each batch takes about as long as it may."""

from dataclasses import dataclass, field
from typing import Final

_ENOUGH_ROWS: Final = 100
"""With fewer a batch becomes hardly shorter, whatever it waits for."""
_MOST_ROWS: Final = 100_000
_STEP: Final = 2.0


@dataclass
class Pace:
    """The size of the next batch; it at most doubles, or halves, from one to the next."""

    rows: int
    target_s: float
    _least_rows: int = field(init=False)

    def __post_init__(self) -> None:
        self._least_rows = min(self.rows, _ENOUGH_ROWS)

    def took(self, rows: int, seconds: float) -> None:
        """Learn from a batch of so many rows."""
        if rows < self.rows:
            return  # a batch that had no more to do says little
        change = min(max(self.target_s / max(seconds, 1e-6), 1 / _STEP), _STEP)
        self.rows = min(max(round(self.rows * change), self._least_rows), _MOST_ROWS)
