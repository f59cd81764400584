"""What a measure is, what it finds, and what counts as good enough."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tests.benchmarks.site import Site

Tell = Callable[[str], None]


class BenchmarkFailed(Exception):
    """A run did not do what was to be timed, so there is no figure."""


@dataclass(frozen=True)
class Options:
    """How much is measured; `samples`, `idle_s` and `transfers` are for pickup, idle, transfers."""

    rows: int = 500_000
    pairs: int = 5
    samples: int = 500
    idle_s: float = 60.0
    transfers: int = 4000


@dataclass(frozen=True)
class Target:
    """A bound, on what is ours or on its ratio to the reference."""

    of: Literal["ours", "ratio"]
    bound: Literal["at least", "below"]
    limit: float

    def __str__(self) -> str:
        what = "" if self.of == "ours" else f"{self.of} "
        return f"{what}{self.bound} {self.limit:g}"

    def is_met_by(self, value: float) -> bool:
        return value >= self.limit if self.bound == "at least" else value < self.limit


@dataclass(frozen=True)
class Figure:
    """One line of the table; the ratio is ours by the reference's."""

    name: str
    unit: str
    ours: float
    reference: float
    ratio: float
    target: Target | None = None

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.target.is_met_by(getattr(self, self.target.of))


@dataclass(frozen=True)
class Report:
    """What one measure found: its figures, and the runs that they are the medians of."""

    figures: Sequence[Figure]
    runs: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class Measure(Protocol):
    """One kind of figure. `ours` and `reference` say in words what is compared."""

    ours: str
    reference: str

    def expected_s(self, options: Options) -> float: ...

    def run(self, site: Site, options: Options, tell: Tell) -> Awaitable[Report]: ...
