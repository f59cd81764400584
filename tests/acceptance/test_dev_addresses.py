"""What `bulwark dev` prints for other terminals never holds an address that was given."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.workers import ROOT

PASSWORD = "not-to-be-shown"


def test_dev_prints_the_address_of_its_own_server_and_not_of_the_one_that_was_given(
    tmp_path: Path, database_url: str
) -> None:
    given = database_url.replace("postgres@", f"postgres:{PASSWORD}@")
    assert PASSWORD in given
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("BULWARK_")}
    with subprocess.Popen(
        [sys.executable, "-m", "worker.cli", "dev"],
        cwd=tmp_path,
        env={**inherited, "PYTHONPATH": str(ROOT), "BULWARK_DATABASE_URL": given},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as dev:
        assert dev.stdout is not None
        said = []
        for line in dev.stdout:
            said.append(line)
            if "worker.started" in line:
                break
        dev.send_signal(signal.SIGINT)
        said.append(dev.stdout.read())

    text = "".join(said)
    assert dev.returncode == 0, text
    assert "export BULWARK_REDIS_URL=redis://" in text
    assert "BULWARK_DATABASE_URL" not in text
    assert PASSWORD not in text
