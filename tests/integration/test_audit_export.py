"""`bulwark audit export`: all of the audit, in order, or one sentence and nothing."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest

from tests.command_line import Cli, make_cli
from tests.inprocess import Bench
from tests.sealing import change_heroes
from tests.workers import ROOT, environment

pytestmark = pytest.mark.once

EXPORT = [sys.executable, "-m", "worker.cli", "audit", "export"]


@pytest.fixture
def cli(database_url: str, redis_url: str) -> Cli:
    return make_cli(database_url, redis_url)


async def test_the_audit_is_exported_whole_and_in_order_without_sensitive_values(
    bench: Bench, connection: asyncpg.Connection, cli: Cli, tmp_path: Path
) -> None:
    changed = await change_heroes(bench, times=2)
    result = await asyncio.to_thread(cli, "audit", "export")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    keys = [(one["job_id"], one["chunk_no"], one["entry_no"]) for one in lines]
    assert keys == sorted(keys)
    assert len(keys) == await connection.fetchval("SELECT count(*) FROM bulwark.audit")
    assert "before_sensitive" not in lines[0]
    assert "Secret" not in result.stdout

    file = tmp_path / "audit.ndjson"
    job = str(changed[1])
    result = await asyncio.to_thread(cli, "audit", "export", str(file), "--job", job)
    assert result.exit_code == 0, result.output
    own = [json.loads(line) for line in file.read_text().splitlines()]
    assert own == [one for one in lines if one["job_id"] == job]


def left_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("$0 $@ > /dev/full", "The output cannot be written: No space left on device."),
        (
            "ulimit -f 8 && $0 $@ audit.ndjson",
            "The file audit.ndjson cannot be written: File too large.",
        ),
    ],
    ids=["output", "file"],
)
async def test_an_export_for_which_there_is_no_room_says_so_and_leaves_nothing(
    bench: Bench, database_url: str, redis_url: str, tmp_path: Path, script: str, said: str
) -> None:
    await change_heroes(bench, times=40)
    env = {**environment(database_url, redis_url), "PYTHONPATH": str(ROOT)}
    ended = await asyncio.to_thread(
        subprocess.run,
        ["/bin/sh", "-c", script, *EXPORT],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"bulwark: {said}\n")
    assert left_in(tmp_path) == []


async def test_an_export_that_nobody_reads_ends_without_a_word(
    bench: Bench, database_url: str, redis_url: str
) -> None:
    await change_heroes(bench)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = await asyncio.to_thread(
            subprocess.run,
            EXPORT,
            cwd=ROOT,
            env=environment(database_url, redis_url),
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")
