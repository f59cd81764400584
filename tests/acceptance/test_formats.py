"""The same records in every format and compression give the same rows, by any way to the worker."""

import asyncio
import csv
import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from backports import zstd
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from tests.football import (
    ARRIVALS_AS_HEROES,
    arrivals_in,
    first_of_each_player,
    needs_data,
    read_records,
)
from tests.object_store import object_store
from tests.workers import ROOT, environment, workers

pytestmark = [needs_data, pytest.mark.once]

PREFIX_RECORDS = 3_000
OPTIONS = (*ARRIVALS_AS_HEROES, "--on-conflict", "skip", "--follow", "--json")


def as_csv(records: list[dict[str, str]], delimiter: str = ",", encoding: str = "utf-8") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode(encoding, errors="xmlcharrefreplace")


def as_ndjson(records: list[dict[str, str]]) -> bytes:
    """Numbers as numbers; of what is not there, half of the rows say null and half nothing."""
    lines = []
    for number, record in enumerate(records):
        row: dict[str, Any] = {name: value or None for name, value in record.items()}
        if row["age"] is not None:
            row["age"] = float(row["age"])
        elif number % 2:
            del row["age"]
        lines.append(json.dumps(row, ensure_ascii=False))
    return "\n".join(lines).encode()


def as_parquet(records: list[dict[str, str]]) -> bytes:
    columns: dict[str, Any] = {
        name: [record[name] or None for record in records] for name in records[0]
    }
    columns["age"] = pa.array([age and float(age) for age in columns["age"]], pa.float64())
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, row_group_size=20_000)
    return out.getvalue()


FORMATS: dict[str, Callable[[list[dict[str, str]]], bytes]] = {
    "csv": as_csv,
    "tsv": lambda records: as_csv(records, "\t"),
    "ndjson": as_ndjson,
    "parquet": as_parquet,
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, 1),
    ".zst": zstd.compress,
}
NAMES = [f"{kind}{end}" for kind in FORMATS for end in PACKED if kind != "parquet" or not end]


def clubs_and_players(records: list[dict[str, str]]) -> tuple[set[str], list[tuple[Any, ...]], int]:
    """What a person would say is in the records: clubs, players by first record, and how many."""
    arrivals = arrivals_in(records)
    clubs = {record["club"] for record in records}
    return clubs, list(first_of_each_player(arrivals)), len(arrivals)


class Town:
    """One worker, and imports into its tables that are looked at and taken out again."""

    def __init__(
        self, sessions: async_sessionmaker[AsyncSession], env: dict[str, str], folder: Path
    ) -> None:
        self.sessions = sessions
        self.env = env
        self.folder = folder

    async def found_clubs(self, names: set[str]) -> None:
        async with self.sessions.begin() as session:
            await session.execute(
                sa.text("INSERT INTO team (name) VALUES (:name)"), [{"name": one} for one in names]
            )

    def write(self, name: str, data: bytes) -> str:
        path = self.folder / name
        path.write_bytes(data)
        return str(path)

    async def imported(
        self, place: str, *options: str, stdin: bytes | None = None
    ) -> tuple[list[tuple[Any, ...]], dict[str, int]]:
        """The players that the import left, and its verdicts; the table is empty afterwards."""
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "worker.cli", "import", "hero", place, *OPTIONS, *options],
            env=self.env,
            cwd=ROOT,
            input=stdin,
            capture_output=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        report = json.loads(done.stdout.splitlines()[-1])
        assert report["adds_up"]
        assert report["done_bytes"] == report["input_bytes"]
        async with self.sessions.begin() as session:
            stored = await session.execute(
                sa.text(
                    "SELECT h.name, h.age, h.external_id, t.name FROM hero AS h "
                    "JOIN team AS t ON t.id = h.team_id ORDER BY h.id"
                )
            )
            rows = [tuple(row) for row in stored]
            await session.execute(sa.text("TRUNCATE hero CASCADE"))
        return rows, report["verdicts"]


async def test_the_first_records_are_the_same_rows_whatever_they_come_as(
    database_url: str,
    redis_url: str,
    sessions: async_sessionmaker[AsyncSession],
    tmp_path: Path,
) -> None:
    records = read_records()[:PREFIX_RECORDS]
    clubs, players, count = clubs_and_players(records)
    verdicts = {"inserted": len(players), "skipped": count - len(players)}
    wanted = (players, verdicts)
    with object_store() as store, workers(tmp_path) as start:
        allowed = f"{tmp_path},s3://bucket/in"
        env = environment(database_url, redis_url, import_folders=allowed) | store.environment()
        start(env)
        town = Town(sessions, env, tmp_path)
        await town.found_clubs(clubs)

        for name in NAMES:
            kind, _, end = name.partition(".")
            data = PACKED[f".{end}" if end else ""](FORMATS[kind](records))
            path = town.write(f"transfers.{name}", data)
            assert await town.imported(path) == wanted, name

        data = as_parquet(records)
        store.objects["/bucket/in/transfers.parquet"] = data
        store.objects["/bucket/in/transfers.ndjson.zst"] = zstd.compress(as_ndjson(records))
        for way in (
            await town.imported(town.write("transfers.parquet", data), "--in-place"),
            await town.imported(f"file://{tmp_path}/transfers.parquet", "--in-place"),
            await town.imported("s3://bucket/in/transfers.parquet"),
            await town.imported("s3://bucket/in/transfers.ndjson.zst"),
            await town.imported("s3://bucket/in/transfers.ndjson.zst", "--spool"),
            await town.imported("-", "--format", "ndjson", stdin=as_ndjson(records)),
            await town.imported("-", stdin=gzip.compress(as_csv(records))),
            await town.imported("-", "--format", "tsv", stdin=as_csv(records, "\t")),
            await town.imported("-", "--delimiter", ";", stdin=as_csv(records, ";")),
            await town.imported("-", "--encoding", "utf-16", stdin=as_csv(records, ",", "utf-16")),
        ):
            assert way == wanted


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("name", ["ndjson.zst", "parquet"])
async def test_all_records_are_the_same_rows_as_the_csv_module_reads(
    env: dict[str, str], sessions: async_sessionmaker[AsyncSession], tmp_path: Path, name: str
) -> None:
    records = read_records()
    clubs, players, count = clubs_and_players(records)
    kind, _, end = name.partition(".")
    town = Town(sessions, env, tmp_path)
    await town.found_clubs(clubs)
    path = town.write(f"transfers.{name}", PACKED[f".{end}" if end else ""](FORMATS[kind](records)))
    verdicts = {"inserted": len(players), "skipped": count - len(players)}
    assert await town.imported(path) == (players, verdicts)
