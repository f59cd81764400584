"""`bulwark dev` as a user runs it: an import from another terminal, Ctrl-C, and again."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from sqlalchemy import make_url

from tests.workers import environment_of, run_bulwark

pytestmark = pytest.mark.once

EXPORT = re.compile(r"export (BULWARK_\w+)='?([^']*)'?\n")
PASSWORD = "not-to-be-shown"


@dataclass
class Said:
    """What `bulwark dev` said, and the processes that it had started by then."""

    lines: list[str] = field(default_factory=list)
    below: list[psutil.Process] = field(default_factory=list)

    @property
    def exports(self) -> dict[str, str]:
        """The settings for other terminals."""
        found = (EXPORT.fullmatch(line) for line in self.lines)
        return {export[1]: export[2] for export in found if export}


@contextmanager
def development(
    folder: Path,
    *,
    ready: str = "The worker starts",
    number: signal.Signals = signal.SIGINT,
    **given: str,
) -> Iterator[Said]:
    """Run `bulwark dev` until it is ready, then tell it to stop; it ends well, and tells all."""
    said = Said()
    with subprocess.Popen(
        [sys.executable, "-m", "worker.cli", "dev"],
        cwd=folder,
        env=environment_of(**given),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as dev:
        assert dev.stdout is not None
        for line in dev.stdout:
            said.lines.append(line)
            if ready in line:
                break
        said.below += psutil.Process(dev.pid).children(recursive=True)
        try:
            yield said
        finally:
            dev.send_signal(number)
            said.lines += dev.stdout
    assert dev.returncode == 0, "".join(said.lines)


def test_dev_needs_nothing_keeps_the_data_and_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "teams.csv").write_text("name\nRed\nBlue\n")
    with development(tmp_path) as first:
        assert set(first.exports) == {"BULWARK_DATABASE_URL", "BULWARK_REDIS_URL"}
        words = ("import", "team", "teams.csv", "--follow", "--json")
        done = run_bulwark(*words, env=environment_of() | first.exports, folder=tmp_path)
    with development(tmp_path) as second:
        listed = run_bulwark(
            "jobs", "--json", env=environment_of() | second.exports, folder=tmp_path
        )

    assert json.loads(done.stdout)["verdicts"] == {"inserted": 2}
    assert json.loads(listed.stdout)["job_id"] == json.loads(done.stdout)["job_id"]
    assert [path.name for path in tmp_path.glob(".b*")] == [".bulwark"]
    for said in (first, second):
        assert len(said.below) >= 3
        assert [one for one in said.below if one.is_running()] == []


def test_dev_uses_the_servers_that_are_given(
    tmp_path: Path, database_url: str, redis_url: str
) -> None:
    with development(
        tmp_path,
        ready="worker.started",
        number=signal.SIGTERM,
        database_url=database_url,
        redis_url=redis_url,
    ) as said:
        assert len(said.below) == 1

    assert not (tmp_path / ".bulwark" / "postgresql").exists()


def test_dev_prints_the_address_of_its_own_server_and_not_of_the_one_that_was_given(
    tmp_path: Path, database_url: str
) -> None:
    url = make_url(database_url)
    password = url.password or PASSWORD
    given = url.set(password=password).render_as_string(hide_password=False)
    with development(tmp_path, ready="worker.started", database_url=given) as said:
        pass

    text = "".join(said.lines)
    assert "export BULWARK_REDIS_URL=redis://" in text
    assert "BULWARK_DATABASE_URL" not in text
    assert password not in text


def test_dev_has_its_own_redis_without_the_password_of_another(tmp_path: Path) -> None:
    with development(tmp_path, ready="worker.started", redis_password=PASSWORD) as said:
        assert len(said.below) >= 3
