"""A worker takes little memory for an input, whatever its format and however large it is."""

import asyncio
import csv
import json
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import asyncpg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.workers import WorkerProcess, run_bulwark

pytestmark = pytest.mark.once

ROWS = int(os.environ.get("MEASURED_ROWS", "200000"))
COLUMNS = ("name", "age", "email", "external_id", "team")
SCHEMA = pa.schema([(name, pa.int32() if name == "age" else pa.string()) for name in COLUMNS])


def heroes() -> Iterator[tuple[Any, ...]]:
    """Every hundredth is refused."""
    for n in range(ROWS):
        age = -1 if n % 100 == 0 else n % 90
        yield f"Hero number {n}", age, f"hero{n}@example.org", f"key-{n}", f"Team {n % 500}"


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(heroes())


def write_ndjson(path: Path) -> None:
    with path.open("w") as file:
        for hero in heroes():
            file.write(json.dumps(dict(zip(COLUMNS, hero, strict=True))) + "\n")


def write_parquet(path: Path) -> None:
    """All rows in one row group, as some writers have it."""
    rows = heroes()
    tables = []
    while some := list(islice(rows, 100_000)):
        tables.append(pa.table(list(map(list, zip(*some, strict=True))), schema=SCHEMA))
    pq.write_table(pa.concat_tables(tables), path, row_group_size=ROWS)


WRITERS = {"csv": write_csv, "ndjson": write_ndjson, "parquet": write_parquet}


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.parametrize("kind", WRITERS)
async def test_a_worker_imports_a_file_of_any_size_with_less_than_200_megabytes(
    kind: str,
    connection: asyncpg.Connection,
    worker: WorkerProcess,
    env: dict[str, str],
    tmp_path: Path,
) -> None:
    await connection.execute(
        "INSERT INTO team (name) SELECT 'Team ' || n FROM generate_series(0, 499) n"
    )
    path = tmp_path / f"heroes.{kind}"
    await asyncio.to_thread(WRITERS[kind], path)
    told = await asyncio.to_thread(imported, path, env)
    assert told["verdicts"] == {"inserted": ROWS - ROWS // 100, "rejected": ROWS // 100}
    assert peak_bytes(worker.pid) < 200_000_000


def imported(path: Path, env: dict[str, str]) -> dict[str, Any]:
    """The report of a job that imported the file."""
    words = ["import", "hero", str(path), "--map", "team=team.name", "--follow", "--json"]
    done = run_bulwark(*words, env=env, timeout_s=600.0)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report
