"""Real input through the command line: 138,420 transfer records, as untidy as they came."""

import csv
import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from tests.workers import ROOT, environment, workers

DATA = ROOT.parent / "shared" / "data" / "football-transfers.csv.gz"

pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"the real input {DATA.name} is not here")

TEAMS = ["team", str(DATA), "--where", "movement=in", "--map", "club=name", "--ignore", "name"]
HEROES = [
    *("hero", str(DATA), "--where", "movement=in", "--map", "club=team.name"),
    *("--map", "external_id={name}|{nationality}|{position}"),
]


def by_the_csv_module_alone() -> tuple[set[str], dict[str, tuple[Any, ...]], int]:
    """Clubs; the first record of each player by his key; and how many records came in."""
    clubs: set[str] = set()
    players: dict[str, tuple[Any, ...]] = {}
    records = 0
    with gzip.open(DATA, "rt", encoding="utf-8", newline="") as file:
        for record in csv.DictReader(file):
            if record["movement"] != "in":
                continue
            records += 1
            clubs.add(record["club"])
            key = f"{record['name']}|{record['nationality']}|{record['position']}"
            age = int(float(record["age"])) if record["age"] else None
            players.setdefault(key, (record["name"], age, key, record["club"]))
    return clubs, players, records


def import_and_follow(env: dict[str, str], arguments: list[str]) -> dict[str, Any]:
    """Run the import to its end, as a person would, and read back what became of it."""
    options = ["--on-conflict", "skip", "--ignore-unknown", "--follow"]
    bulwark = [sys.executable, "-m", "worker.cli"]
    done = _run([*bulwark, "import", *arguments, *options, "--json"], env)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def _run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


async def test_the_transfer_records_go_in_as_the_csv_module_reads_them_and_only_once(
    database_url: str,
    redis_url: str,
    sessions: async_sessionmaker[AsyncSession],
    tmp_path: Path,
) -> None:
    clubs, players, records = by_the_csv_module_alone()
    env = environment(database_url, redis_url)
    with workers(tmp_path) as start:
        start(env)
        teams = import_and_follow(env, TEAMS)
        heroes = import_and_follow(env, HEROES)
        again = import_and_follow(env, HEROES)
    async with sessions() as session:
        stored = await session.execute(
            sa.text(
                "SELECT h.name, h.age, h.external_id, t.name FROM hero AS h "
                "JOIN team AS t ON t.id = h.team_id ORDER BY h.id"
            )
        )
        assert [tuple(row) for row in stored] == list(players.values())
        names = set(await session.scalars(sa.text("SELECT name FROM team")))
    assert names == clubs
    assert Counter(teams["verdicts"]) == Counter(inserted=len(clubs), skipped=records - len(clubs))
    assert Counter(heroes["verdicts"]) == Counter(
        inserted=len(players), skipped=records - len(players)
    )
    assert Counter(again["verdicts"]) == Counter(skipped=records)
