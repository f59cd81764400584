"""The table of the faults that were provoked, and what each has cost."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

import pytest
from rich.console import Console
from rich.table import Table

PROPERTY = "bulwark.fault"
MOST_RECOVERY_S = {"SIGKILL": 25.0, "Redis": 5.0}
"""How long recovery may take from the faults whose names begin so."""
COLUMNS = (
    "fault",
    "times provoked",
    "jobs",
    "effects lost",
    "effects doubled",
    "recovery, median s",
    "recovery, worst s",
)


class Provoked(Protocol):
    """Says what a test has provoked; fails if anything was lost or doubled, or took too long."""

    def __call__(
        self,
        fault: str,
        *,
        times: int,
        jobs: int,
        lost: int,
        doubled: int,
        recovery_s: Sequence[float] = (),
    ) -> None: ...


@pytest.fixture
def provoked(record_property: Callable[[str, object], None]) -> Provoked:
    """A line of the table; lines of one fault are added up."""

    def say(
        fault: str,
        *,
        times: int,
        jobs: int,
        lost: int,
        doubled: int,
        recovery_s: Sequence[float] = (),
    ) -> None:
        row = Row(times, jobs, lost, doubled, [*recovery_s])
        record_property(PROPERTY, json.dumps([fault, *vars(row).values()]))
        assert (lost, doubled) == (0, 0), f"{fault}: {lost} effects lost, {doubled} doubled"
        for name, most_s in MOST_RECOVERY_S.items():
            if fault.startswith(name) and recovery_s:
                assert max(recovery_s) < most_s, f"{fault}: recovered after {recovery_s} s"

    return say


@dataclass
class Row:
    """What became of one fault."""

    times: int = 0
    jobs: int = 0
    lost: int = 0
    doubled: int = 0
    recovery_s: list[float] = field(default_factory=list)

    def add(self, other: "Row") -> None:
        self.times += other.times
        self.jobs += other.jobs
        self.lost += other.lost
        self.doubled += other.doubled
        self.recovery_s += other.recovery_s

    def cells(self) -> list[str]:
        seconds = self.recovery_s and (median(self.recovery_s), max(self.recovery_s))
        counts = [f"{n:,}" for n in (self.times, self.jobs, self.lost, self.doubled)]
        return [*counts, *([f"{s:.2f}" for s in seconds] or ["", ""])]


class FaultTable:
    """Adds up what the tests have said, also those in other processes."""

    def __init__(self) -> None:
        self._rows: defaultdict[str, Row] = defaultdict(Row)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            for name, value in report.user_properties:
                if name == PROPERTY:
                    fault, *row = json.loads(str(value))
                    self._rows[fault].add(Row(*row))

    def pytest_terminal_summary(self) -> None:
        table = Table(*COLUMNS, title="Faults provoked")
        for fault, row in sorted(self._rows.items()):
            table.add_row(fault, *row.cells())
        Console(width=140).print(table)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", action="store_true", help="print the table of faults at the end")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--faults") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FaultTable())
