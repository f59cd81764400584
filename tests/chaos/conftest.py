"""The table of the faults that were provoked, what each has cost, and which were not provoked."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Protocol

import pytest
from rich.console import Console
from rich.table import Table

from tests.every_kind import Field
from tests.inprocess import Bench
from tests.stage import Stage

FAULT = "bulwark.fault"
PROVOKES = "bulwark.provokes"
"""Marks the reports of tests that are to provoke a fault, by the name of the test."""
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
def provoked(
    record_property: Callable[[str, object], None], pytestconfig: pytest.Config
) -> Provoked:
    """A line of the table; lines of one fault are added up.

    How long recovery took is judged where the table is asked for: not beside the whole suite.
    """
    limits = MOST_RECOVERY_S if pytestconfig.getoption("--faults") else {}

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
        record_property(FAULT, json.dumps([fault, *vars(row).values()]))
        assert (lost, doubled) == (0, 0), f"{fault}: {lost} effects lost, {doubled} doubled"
        for name, most_s in limits.items():
            if fault.startswith(name) and recovery_s:
                assert max(recovery_s) < most_s, f"{fault}: recovered after {recovery_s} s"

    return say


@pytest.fixture
def field(bench: Bench, stage: Stage, database_url: str, tmp_path: Path) -> Field:
    """Tasks of every kind, and what must be there when they are done."""
    return Field(bench, stage, database_url, tmp_path)


@dataclasses.dataclass
class Row:
    """What became of one fault."""

    times: int = 0
    jobs: int = 0
    lost: int = 0
    doubled: int = 0
    recovery_s: list[float] = dataclasses.field(default_factory=list)

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
    """Adds up what the tests have said, also those in other processes, and tells of the skipped."""

    def __init__(self) -> None:
        self._rows: defaultdict[str, Row] = defaultdict(Row)
        self._skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = dict(report.user_properties).get(PROVOKES)
        if report.skipped and test is not None:
            self._skipped.append(f"not provoked: {_reason(report)} ({test})")
        if report.when == "call":
            for name, value in report.user_properties:
                if name == FAULT:
                    fault, *row = json.loads(str(value))
                    self._rows[fault].add(Row(*row))

    def pytest_terminal_summary(self) -> None:
        table = Table(*COLUMNS, title="Faults provoked")
        for fault, row in sorted(self._rows.items()):
            table.add_row(fault, *row.cells())
        console = Console(width=140)
        console.print(table)
        for line in self._skipped:
            console.print(line, markup=False, soft_wrap=True)


def _reason(report: pytest.TestReport) -> str:
    """Why the test was skipped."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return str(report.longrepr)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let the reports of a test tell that it is to provoke a fault, even if it never says so."""
    if "provoked" in getattr(item, "fixturenames", ()):
        item.user_properties.append((PROVOKES, item.name))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", action="store_true", help="print the table of faults at the end")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--faults") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FaultTable())
