"""`make bench` works: what it measures on a few rows is worth nothing, its form is looked at."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
SMALL = ["--rows", "2000", "--pairs", "1", "--samples", "3", "--idle-s", "0.5", "--transfers", "40"]
MEASURES = ("insert", "upsert", "update", "purge", "pickup", "idle", "transfers")


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.benchmarks", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a run of the measures prints and writes; whether targets are met is left open."""
    out = tmp_path_factory.mktemp("bench") / "new" / "latest.json"
    done = bench(*MEASURES, *SMALL, "--out", str(out))
    assert done.returncode in {0, 1}, done.stderr
    assert done.stderr == ""
    return done.stdout, json.loads(out.read_text())


def test_it_says_first_how_long_it_takes(ran: tuple[str, dict[str, Any]]) -> None:
    assert ran[0].startswith(f"Measuring {', '.join(MEASURES)}: about ")


def test_every_figure_stands_with_its_reference_and_target(
    ran: tuple[str, dict[str, Any]],
) -> None:
    measures = ran[1]["measures"]
    figures = [(name, one) for name, found in measures.items() for one in found["figures"]]

    assert [(name, one["name"]) for name, one in figures] == [
        ("insert", "speed"),
        ("upsert", "speed"),
        ("update", "speed"),
        ("purge", "speed"),
        ("purge", "p50 of updates beside"),
        ("purge", "p99 of updates beside"),
        ("pickup", "p50"),
        ("pickup", "p99"),
        ("idle", "CPU"),
        ("transfers", "speed"),
    ]
    for name, one in figures:
        assert set(one) == {"name", "unit", "ours", "reference", "ratio", "target", "met"}
        assert f"{name} " in ran[0]
        if "beside" not in one["name"]:
            assert isinstance(one["met"], bool)
            assert one["target"] in ran[0]


def test_every_run_of_an_import_tells_its_rows_and_cpu_time(
    ran: tuple[str, dict[str, Any]],
) -> None:
    for name in ("insert", "upsert"):
        [pair] = ran[1]["measures"][name]["runs"]
        assert pair["ours"]["rows"] == pair["reference"]["rows"] == 2000
        assert pair["ours"]["worker_cpu_s"] > 0
        assert pair["ours"]["job_s"] > 0


def test_what_the_figures_depend_on_is_told_and_no_place_on_this_machine(
    ran: tuple[str, dict[str, Any]],
) -> None:
    document = ran[1]

    assert {"postgresql", "arq", "python"} <= set(document["versions"])
    assert document["postgresql"]["fsync"] == "on"
    assert document["options"]["rows"] == 2000
    assert '"/' not in json.dumps(document)


def test_a_measure_that_there_is_not_is_refused() -> None:
    refused = bench("inserts")

    assert refused.returncode == 2
    assert "inserts" in refused.stderr


def test_transfers_are_drained_by_both_sides(ran: tuple[str, dict[str, Any]]) -> None:
    [pair] = ran[1]["measures"]["transfers"]["runs"]

    assert pair["ours"]["transfers"] == pair["reference"]["transfers"] == 40
    assert pair["reference"]["max_jobs"] in {10, 50}
