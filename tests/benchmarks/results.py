"""What was measured, as JSON for programs and as a table for people."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from tests.benchmarks.cpu import load_1min
from tests.benchmarks.measure import Figure, Measure, Options, Report
from tests.benchmarks.site import Site
from worker.display import grid, number

_PACKAGES = ("bulwark-worker", "arq", "asyncpg", "pydantic", "redis", "sqlalchemy", "sqlmodel")
_SERVER_SETTINGS = ("fsync", "synchronous_commit", "shared_buffers", "max_wal_size")


@dataclass(frozen=True)
class Outcome:
    """One measure with its report, or with the reason why there is none."""

    name: str
    measure: Measure
    report: Report | None = None
    error: str | None = None

    @property
    def good(self) -> bool:
        figures = self.report.figures if self.report else ()
        return self.error is None and all(figure.met is not False for figure in figures)


async def circumstances(site: Site, options: Options) -> dict[str, Any]:
    """What the figures depend on, without a word about whose machine it is."""
    ask = site.connection.fetchval
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "postgresql": await ask("SHOW server_version"),
            **{name: version(name) for name in _PACKAGES},
        },
        "postgresql": {name: await ask(f"SHOW {name}") for name in _SERVER_SETTINGS},
        "cores": os.cpu_count(),
        "load_1min_before": round(load_1min(), 2),
        "options": asdict(options),
    }


def write_json(path: Path, around: Mapping[str, Any], outcomes: list[Outcome]) -> None:
    """Replace the file by what was measured now."""
    document = {**around, "measures": {one.name: _as_json(one) for one in outcomes}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, default=str) + "\n")


def _as_json(outcome: Outcome) -> dict[str, Any]:
    compared = {"ours": outcome.measure.ours, "reference": outcome.measure.reference}
    if outcome.report is None:
        return {**compared, "error": outcome.error}
    report = outcome.report
    figures = [
        asdict(figure) | {"target": figure.target and str(figure.target), "met": figure.met}
        for figure in report.figures
    ]
    return {**compared, "figures": figures, "facts": report.facts, "runs": report.runs}


def table(outcomes: list[Outcome]) -> Table:
    """A line for each figure, or for why there is none."""
    names = ("measure", "figure", "ours", "reference", "ratio", "target", "")
    rows: list[tuple[Any, ...]] = []
    for one in outcomes:
        if one.report is None:
            rows.append((one.name, "", "", "", "", "", Text("failed, see above", "bold red")))
        else:
            rows += [(one.name, *_cells(figure)) for figure in one.report.figures]
    return grid(names, rows, right=names[2:5])


def _cells(figure: Figure) -> tuple[Any, ...]:
    met = {True: Text("met", "green"), False: Text("NOT MET", "bold red"), None: ""}[figure.met]
    values = (_value(figure.ours, figure.unit), _value(figure.reference, figure.unit))
    return (figure.name, *values, f"{figure.ratio:.2f}", str(figure.target or ""), met)


def _value(value: float, unit: str) -> str:
    return f"{value:.2f} {unit}" if value < 10 else number(value, unit)
