"""Real input, with on_conflict update: each player ends where his last record puts him."""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from tests.workers import ROOT, environment, workers

DATA = ROOT.parent / "shared" / "data" / "football-transfers.csv.gz"

pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"the real input {DATA.name} is not here")


def last_club_of_each_player() -> tuple[dict[str, tuple[Any, ...]], int]:
    """By the csv module alone: the last record of each player by his key, and how many came in."""
    players: dict[str, tuple[Any, ...]] = {}
    records = 0
    with gzip.open(DATA, "rt", encoding="utf-8", newline="") as file:
        for record in csv.DictReader(file):
            if record["movement"] == "in":
                records += 1
                key = f"{record['name']}|{record['nationality']}|{record['position']}"
                age = int(float(record["age"])) if record["age"] else None
                players[key] = (record["name"], age, record["club"])
    return players, records


def import_all(env: dict[str, str]) -> dict[str, int]:
    """Import all that came in, as a person would, and return the verdicts."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "worker.cli", "import", "hero", str(DATA)),
            *("--where", "movement=in", "--map", "club=team.name", "--on-missing", "create"),
            *("--map", "external_id={name}|{nationality}|{position}", "--ignore-unknown"),
            *("--on-conflict", "update", "--follow", "--json"),
        ],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    verdicts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])["verdicts"]
    return verdicts


async def test_each_player_ends_at_the_club_of_his_last_record(
    database_url: str,
    redis_url: str,
    sessions: async_sessionmaker[AsyncSession],
    tmp_path: Path,
) -> None:
    players, records = last_club_of_each_player()
    env = environment(database_url, redis_url)
    with workers(tmp_path) as start:
        start(env)
        verdicts = import_all(env)
    async with sessions() as session:
        stored = await session.execute(
            sa.text(
                "SELECT h.external_id, h.name, h.age, t.name FROM hero AS h "
                "JOIN team AS t ON t.id = h.team_id"
            )
        )
        assert {key: tuple(rest) for key, *rest in stored} == players
        changed = await session.scalar(
            sa.text("SELECT count(*) FROM bulwark.audit WHERE action = 'update'")
        )
    assert sum(verdicts.values()) == records
    assert verdicts["inserted"] == len(players)
    assert verdicts["updated"] == changed
    assert set(verdicts) <= {"inserted", "updated", "unchanged"}
