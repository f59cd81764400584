"""`bulwark dev` as a user runs it: an import from another terminal, Ctrl-C, and again."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]


def bulwark(folder: Path, env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "worker.cli", *words],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def plain_environment() -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("BULWARK_")}
    return {**inherited, "PYTHONPATH": str(ROOT)}


@contextmanager
def development(folder: Path, env: dict[str, str]) -> Iterator[dict[str, str]]:
    """Run `bulwark dev`, give what it prints for other terminals, then press Ctrl-C."""
    with subprocess.Popen(
        [sys.executable, "-m", "worker.cli", "dev"],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as dev:
        assert dev.stdout is not None
        exports = {}
        for line in dev.stdout:
            if found := re.fullmatch(r"export (BULWARK_\w+)='?([^']*)'?\n", line):
                exports[found[1]] = found[2]
            if "The worker starts" in line:
                break
        below = psutil.Process(dev.pid).children(recursive=True)
        try:
            yield exports
        finally:
            dev.send_signal(signal.SIGINT)
            rest = dev.stdout.read()
    assert dev.returncode == 0, rest
    assert len(below) >= 3
    assert [one for one in below if one.is_running()] == []


def test_dev_needs_nothing_keeps_the_data_and_leaves_no_process(
    tmp_path: Path, plain_environment: dict[str, str]
) -> None:
    (tmp_path / "teams.csv").write_text("name\nRed\nBlue\n")
    with development(tmp_path, plain_environment) as exports:
        assert set(exports) == {"BULWARK_DATABASE_URL", "BULWARK_REDIS_URL"}
        env = plain_environment | exports
        done = bulwark(tmp_path, env, "import", "team", "teams.csv", "--follow", "--json")
    with development(tmp_path, plain_environment) as exports:
        listed = bulwark(tmp_path, plain_environment | exports, "jobs", "--json")

    assert json.loads(done.stdout)["verdicts"] == {"inserted": 2}
    assert json.loads(listed.stdout)["job_id"] == json.loads(done.stdout)["job_id"]
    assert [path.name for path in tmp_path.glob(".b*")] == [".bulwark"]


def test_dev_uses_the_servers_that_are_given(
    tmp_path: Path, plain_environment: dict[str, str], database_url: str, redis_url: str
) -> None:
    given = {"BULWARK_DATABASE_URL": database_url, "BULWARK_REDIS_URL": redis_url}
    with subprocess.Popen(
        [sys.executable, "-m", "worker.cli", "dev"],
        cwd=tmp_path,
        env=plain_environment | given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as dev:
        assert dev.stdout is not None
        for line in dev.stdout:
            if "worker.started" in line:
                break
        below = psutil.Process(dev.pid).children(recursive=True)
        dev.send_signal(signal.SIGTERM)
        rest = dev.stdout.read()

    assert dev.returncode == 0, rest
    assert len(below) == 1
    assert not (tmp_path / ".bulwark" / "postgresql").exists()
