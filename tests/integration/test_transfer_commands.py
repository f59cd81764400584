"""Transfers from the command line: what is enqueued, and what is refused before it is."""

import asyncio
import json
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.command_line import Cli, make_cli, sentence
from tests.inprocess import Bench
from tests.league import ANN, BLUE, BOB, CID, EVE, FAY, FULL, RED, found_league, transfers

pytestmark = pytest.mark.once


@pytest.fixture
async def cli(database_url: str, redis_url: str, connection: asyncpg.Connection) -> Cli:
    """On a league, without a worker."""
    await found_league(connection)
    return make_cli(database_url, redis_url)


async def enqueued(cli: Cli, *words: str) -> dict[str, Any]:
    """The payload that a command enqueues."""
    result = await asyncio.to_thread(cli, *words, "--json", "--actor", "Zoë")
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


MOVES = [
    ("transfer --hero 1 --hero 2 --from 1 --to 2", [(ANN, RED, BLUE), (BOB, RED, BLUE)]),
    ("transfer --hero 6 --to 2", [(FAY, None, BLUE)]),
    ("transfer --hero 5 --hero 6 --from-anywhere --to 2", [(EVE, FULL, BLUE), (FAY, None, BLUE)]),
    ("transfer --hero 5 --from-anywhere", [(EVE, FULL, None)]),
    ("release --hero 3 --from 1 --expect-version 3=1", [(CID, RED, None)]),
    (
        "swap --team-a 1 --hero-a 1 --team-b 3 --hero-b 5",
        [(ANN, RED, FULL), (EVE, FULL, RED)],
    ),
    ("transfer --hero 1 --from 1 --to 2 --dry-run", []),
    ("transfer --hero 1 --from 1 --to 2 --expect-version 1=7", []),
]


@pytest.mark.parametrize(("line", "moved"), MOVES)
async def test_a_command_moves_whom_it_names(
    line: str, moved: list[Any], cli: Cli, bench: Bench, connection: asyncpg.Connection
) -> None:
    accepted = await enqueued(cli, *line.split(), "--reason", "winter")
    await bench.deliver(accepted["job_id"])

    assert await transfers(connection) == moved
    assert await connection.fetchval("SELECT actor FROM bulwark.job") == "Zoë"
    reasons = await connection.fetch("SELECT DISTINCT reason FROM transfer")
    assert [tuple(row) for row in reasons] == ([("winter",)] if moved else [])


async def test_a_file_is_a_window_of_transfers(
    cli: Cli, bench: Bench, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    path = tmp_path / "window.csv"
    path.write_text("who,left,joined\n1,Red,Blue\n1,Red,Blue\n6,,Blue\n")
    words = ["--map", "who=hero_id", "--map", "left=from_team_id.name"]
    accepted = await enqueued(
        cli, "transfer-window", str(path), *words, "--map", "joined=to_team_id.name"
    )
    await bench.deliver(accepted["job_id"])

    assert await transfers(connection) == [(ANN, RED, BLUE), (FAY, None, BLUE)]
    refused = await asyncio.to_thread(cli, "rejects", accepted["job_id"])
    assert "not_in_from_team" in refused.stdout


REFUSED = {
    "transfer --hero 1": "neither a team to leave nor a team to join is given",
    "transfer --hero 1 --from 1 --from-anywhere --to 2": "from_anywhere does not go with",
    "transfer --hero 1 --to 2 --expect-version 2=1": "hero 2, who is not to be moved",
    "transfer --hero 1 --to 2 --expect-version 1": "--expect-version '1' is not of the form",
    "transfer --hero 1 --to 2 --expect-version 1=x": "--expect-version: Input should be a valid",
    "transfer --hero 99999999999999999999 --to 2": "--hero: Input should be less than",
    "transfer --to 2": "Missing option '--hero'",
    "release --hero 1": "Missing option '--from'",
    "swap --team-a 1 --hero-a 1 --team-b 99999999999999999999 --hero-b 2": "--team-b: Input",
    "transfer-window window.csv": "does not say which team a hero joins",
    "transfer-window window.csv --map joined=to_team_id.name": "which team a hero leaves",
    "transfer-window window.csv --map joined=to_team_id.nam": "team has no column 'nam'",
}


@pytest.mark.parametrize("line", REFUSED)
async def test_what_makes_no_sense_is_told_in_a_sentence_and_not_enqueued(
    line: str,
    cli: Cli,
    connection: asyncpg.Connection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "window.csv").write_text("hero_id,joined\n1,Blue\n")
    monkeypatch.chdir(tmp_path)
    more = [] if "--map" in line or "window" not in line else ["--ignore", "joined"]
    result = await asyncio.to_thread(cli, *line.split(), *more)

    assert result.exit_code == 2
    assert REFUSED[line] in sentence(result)
    assert await connection.fetchval("SELECT count(*) FROM bulwark.job") == 0
