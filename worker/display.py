"""How the command line shows things: tables, one job, progress while it runs, and JSON."""

import json
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from db.ledger.job import State
from db.ledger.verdict import Verdict
from worker.reports import JobReport

PLAIN_WIDTH = 200
"""Characters of a line that goes to a file or a pipe, where no window limits it."""
PLAIN_INTERVAL_S = 5.0
SPEED_WINDOW_S = 3.0
SILENCE_WORTH_TELLING_S = 6.0

_WORTH_A_LOOK = (Verdict.REJECTED, Verdict.SKIPPED)
_NUMBER = re.compile(r"\d+")
_COLOURS = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "running": "cyan"}


def make_console(*, stderr: bool = False) -> Console:
    """A console as wide as the window, or wide enough for whole lines where there is none."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def say(sentence: str) -> None:
    """Print one line, which a narrow window may break but nothing else."""
    make_console().print(Text(sentence), soft_wrap=True)


def to_json(document: Mapping[str, Any]) -> str:
    """One line of JSON; instants are ISO, ids are text."""
    return json.dumps(document, default=_plain, ensure_ascii=False)


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def moment(at: datetime | None) -> str:
    """An instant in UTC, for a column whose name says so."""
    return "" if at is None else at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def instant(at: datetime | None) -> str:
    return "" if at is None else f"{moment(at)} UTC"


def number(value: float | None, unit: str = "") -> str:
    """With separators; fractions only where they say something."""
    if value is None:
        return ""
    digits = f"{value:,.1f}" if value < 100 and value % 1 else f"{value:,.0f}"
    return f"{digits} {unit}".rstrip()


def grid(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[str] = ()
) -> Table:
    """A table without lines, whose cells are shown whole and taken as they are."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.show_header, table.header_style = any(columns), "bold"
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return table


def state_text(state: str, reason: str | None = None) -> Text:
    shown = f"{state} ({reason})" if reason else state
    return Text(shown, style=_COLOURS.get(state, ""))


def show_job(console: Console, report: JobReport) -> None:
    """All that the ledger knows of one job, and whether its rows add up."""
    heading = Text(f"job {report.id}  {report.kind}")
    heading.append(f" into {report.table_name}  " if report.table_name else "  ")
    console.print(heading.append_text(state_text(report.state, report.reason)))
    facts = [(name, text) for name, text in _facts(report) if text]
    console.print(grid(("", ""), facts) if facts else "")
    if report.tally.chunks or report.ended:
        console.print(_verdicts(report))
        for line in _sum(report):
            console.print(line, soft_wrap=True)


def _facts(report: JobReport) -> list[tuple[str, str]]:
    by = f" by {report.actor}" if report.actor else ""
    ran = ""
    if report.run_s is not None:
        ran = f"{report.run_s:,.1f} s, {number(report.rows_per_s or 0.0)} rows a second"
    failed = f"{report.attempt} of {report.max_attempts}" if report.attempt else ""
    waits = "" if report.ended else note(report)
    return [
        ("input", report.source or ""),
        ("accepted", f"{instant(report.created_at)}{by}"),
        ("started", instant(report.started_at)),
        ("ended", instant(report.finished_at)),
        ("took", ran),
        ("attempts failed", failed),
        ("error", report.error or ""),
        ("now", waits),
    ]


def _verdicts(report: JobReport) -> Table:
    rows = [(name, f"{count:,}") for name, count in sorted(report.tally.counts.items())]
    if report.tally.filtered:
        rows.append(("not selected by --where", f"{report.tally.filtered:,}"))
    rows.append(("rows read", f"{report.tally.rows:,}"))
    return grid(("verdict", "rows"), rows, right=("rows",))


def _sum(report: JobReport) -> Iterator[Text]:
    """The verdicts added up, and what has none."""
    parts = [*(count for _, count in sorted(report.tally.counts.items()))]
    parts += [report.tally.filtered] if report.tally.filtered else []
    terms = " + ".join(f"{part:,}" for part in parts) or "0"
    rows = report.tally.rows
    if report.adds_up:
        yield Text(f"{terms} = {rows:,}: every row is accounted for", style="green")
    elif report.counted != rows:
        yield Text(f"{terms} is not {rows:,}: rows are missing", style="bold red")
    else:
        yield Text(f"{terms} = {rows:,}: the rows read are accounted for")
    if report.ended and not report.reached_end:
        yield Text(_unread(report), style="bold red")


def _unread(report: JobReport) -> str:
    size = "" if report.unread_bytes is None else f" ({report.unread_bytes:,} bytes)"
    remedy = f"`bulwark retry {report.id}` goes on with it"
    if report.state == State.FAILED:
        remedy = f"mend what made the job fail; then {remedy}"
    return (
        f"{report.tally.rows:,} rows were read; the rest of the input{size} was not reached and "
        f"has no verdicts: {remedy}"
    )


def note(report: JobReport) -> str:
    """What the job is doing, or what it waits for."""
    if report.state == State.RUNNING:
        if (report.silent_s or 0) > SILENCE_WORTH_TELLING_S:
            return f"its worker has been silent for {report.silent_s:.0f} s"
        if report.pause is not None:
            return f"pauses: {report.pause}"
        if report.uncommitted_rows is not None:
            return f"running; {report.uncommitted_rows:,} rows are in, and nothing is committed yet"
        return "running"
    if report.state == State.QUEUED:
        if report.run_at > report.read_at:
            return f"waits until {instant(report.run_at)}"
        if not report.live_workers:
            return f"queued; no worker serves the queue {report.queue}: start `bulwark worker`"
    return report.state.value


class Follower(Protocol):
    """Shows one report after the other."""

    def show(self, report: JobReport, doing: str | None = None) -> None:
        """Show how far the job is; `doing` says it in other words than `note`."""


@contextmanager
def following(console: Console) -> Iterator[Follower]:
    """A live bar on a terminal; elsewhere a line now and then."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        yield _Bar(progress)


class _Bar:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None, figures="")
        self._speed = _Speed()

    def show(self, report: JobReport, doing: str | None = None) -> None:
        done, whole = _extent(report)
        self._progress.update(
            self._task,
            description=doing or note(report),
            completed=done,
            total=whole,
            figures=_figures(report, self._speed.after(report.tally.rows)),
        )


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: tuple[str, str] | None = None
        self._told_s = 0.0
        self._speed = _Speed()

    def show(self, report: JobReport, doing: str | None = None) -> None:
        rows_per_s = self._speed.after(report.tally.rows)
        state = (report.state.value, _NUMBER.sub("", doing or ""))
        if state == self._last and time.monotonic() - self._told_s < PLAIN_INTERVAL_S:
            return
        self._last, self._told_s = state, time.monotonic()
        done, whole = _extent(report)
        share = f"{done / whole:4.0%}" if whole else "  0%"
        line = f"{share}  {_figures(report, rows_per_s)}  {doing or note(report)}"
        self._console.print(Text(line))


class _Speed:
    """Rows a second over the last few seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def after(self, rows: int) -> float:
        """Take note of the rows done by now, and say how fast they come."""
        now_s = time.monotonic()
        self._seen.append((now_s, rows))
        while now_s - self._seen[0][0] > SPEED_WINDOW_S:
            self._seen.popleft()
        first_s, first_rows = self._seen[0]
        return (rows - first_rows) / max(now_s - first_s, 0.1)


def _extent(report: JobReport) -> tuple[int, int | None]:
    """How many bytes of the input are done, of how many."""
    if report.state == State.SUCCEEDED:
        whole = report.input_bytes or 1
        return whole, whole
    return report.uncommitted_bytes or report.tally.bytes, report.input_bytes


def _figures(report: JobReport, rows_per_s: float) -> str:
    counts = report.tally.counts
    others = "".join(f", {counts[name]:,} {name}" for name in _WORTH_A_LOOK if name in counts)
    speed = f", {rows_per_s:,.0f} rows/s" if rows_per_s else ""
    return f"{report.tally.rows:,} rows{others}{speed}"
