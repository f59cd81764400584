"""`bulwark demo` as a user runs it: it proves what it promises, and leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from worker.demo_data import FAULTS, write_heroes

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
ROWS = 20_000


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the demo makes its temporary folder, which has to be gone when it has ended."""
    place = tmp_path / "t"
    place.mkdir()
    yield place
    assert list(place.iterdir()) == []


def start(folder: Path) -> subprocess.Popen[str]:
    """The demo, among settings that would mislead it."""
    misleading = {
        "BULWARK_DATABASE_URL": "postgresql://nobody@nowhere.invalid/x",
        "BULWARK_NO_SUCH_SETTING": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "worker.cli", "demo", "--rows", str(ROWS)],
        cwd=ROOT,
        env={**os.environ, **misleading, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def those_of(folder: Path) -> list[psutil.Process]:
    """Every process that works in the folder or is told of it."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = [*(process.info["cmdline"] or []), process.info["cwd"] or ""]
        if process.pid != os.getpid() and any(str(folder) in word for word in words):
            found.append(process)
    return found


def test_the_demo_kills_a_worker_and_proves_that_nothing_was_lost(folder: Path) -> None:
    with start(folder) as demo:
        assert demo.stdout is not None
        told = demo.stdout.read()

    assert demo.returncode == 0, told
    assert "Worker 1 was killed with SIGKILL" in told
    assert "worker 2 goes on" in told
    assert "19,800 + 200 = 20,000: every row is accounted for" in told
    assert re.search(r"^ok +SELECT count\(\*\) FROM hero +19,800 +19,800$", told, re.MULTILINE)
    assert "WRONG" not in told
    assert those_of(folder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_interrupted_leaves_nothing_behind(
    folder: Path, number: signal.Signals
) -> None:
    with start(folder) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "Worker 1 is process" in line:
                break
        assert those_of(folder) != []
        demo.send_signal(number)
        rest = demo.stdout.read()

    assert demo.returncode == 130
    assert "Traceback" not in rest
    assert those_of(folder) == []


def test_a_demo_that_is_killed_leaves_nothing_behind(folder: Path) -> None:
    with start(folder) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "Worker 1 is process" in line:
                break
        left = those_of(folder)
        demo.kill()

    gone, alive = psutil.wait_procs([one for one in left if one.pid != demo.pid], timeout=30)
    assert (len(gone) > 2, alive) == (True, [])


def test_the_heroes_are_the_same_every_time_and_one_in_a_hundred_is_bad(tmp_path: Path) -> None:
    first, second = tmp_path / "1.csv", tmp_path / "2.csv"
    expected = write_heroes(first, 12_300)
    write_heroes(second, 12_300)
    lines = first.read_bytes().splitlines()

    assert first.read_bytes() == second.read_bytes()
    assert len(lines) == 12_301
    assert expected.rejected.total() == 123
    assert expected.inserted == 12_300 - 123
    assert set(expected.rejected) == {(fault.code, fault.column) for fault in FAULTS}


def test_what_is_expected_of_the_heroes_can_be_seen_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "heroes.csv"
    expected = write_heroes(file, 8_000)
    rows = [line.split(b",") for line in file.read_bytes().splitlines()[1:]]
    teams = {f"Team {n:03}".encode() for n in range(500)}
    seen: set[bytes] = set()
    bad: Counter[str] = Counter()
    ages = 0
    for row in rows:
        if len(row) != 5:
            bad["fields"] += 1
        elif row[4] not in teams:
            bad["team"] += 1
        elif not row[2].isdigit():
            bad["age"] += 1
        elif not row[1]:
            bad["name"] += 1
        elif b"@" not in row[3]:
            bad["email"] += 1
        elif b"\xe9" in row[1] and row[1].endswith(b"\xe9"):
            bad["utf8"] += 1
        elif row[0] in seen:
            bad["twice"] += 1
        else:
            seen.add(row[0])
            ages += int(row[2])

    assert bad == {
        "fields": 10,
        "team": 10,
        "age": 20,
        "name": 10,
        "email": 10,
        "utf8": 10,
        "twice": 10,
    }
    assert (expected.inserted, expected.ages_sum) == (len(seen), ages)
