"""`bulwark purge` and `bulwark restore-archive`: what they enqueue, and the switch."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import Cli, make_cli, sentence

pytestmark = pytest.mark.once


@pytest.fixture
def cli(database_url: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    return make_cli(database_url, redis_url)


async def payload_of(connection: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(
        await connection.fetchval("SELECT payload FROM bulwark.job ORDER BY id DESC LIMIT 1")
    )
    return document


async def in_thread(cli: Cli, *words: str) -> Any:
    """The command line runs an event loop of its own, so it cannot run inside the test's."""
    import asyncio

    return await asyncio.to_thread(cli, *words)


async def test_the_options_of_a_purge_stand_in_its_job(
    cli: Cli, connection: Any, tmp_path: Path
) -> None:
    options = "--dry-run --max-rows 7 --archive old --archive-format parquet --batch-rows 9"
    more = ("--target-s", "2", "--most-lag-mib", "5", "--until", "06:00 Europe/Berlin")
    words = ("purge", "hero", "Team", "--retention-days", "hero=3", *options.split(), *more)

    result = await in_thread(cli, *words)

    assert result.exit_code == 0, result.output
    assert await payload_of(connection) == {
        "tables": ["hero", "Team"],
        "retention_days": {"hero": 3},
        "dry_run": True,
        "max_rows": 7,
        "archive": str(tmp_path / "old"),
        "archive_format": "parquet",
        "until": "06:00 Europe/Berlin",
        "batch_rows": 9,
        "target_s": 2.0,
        "most_lag_mib": 5,
    }


async def test_the_options_of_a_restore_stand_in_its_job(cli: Cli, connection: Any) -> None:
    result = await in_thread(cli, "restore-archive", "s3://b/old", "--table", "hero", "--dry-run")

    assert result.exit_code == 0, result.output
    assert await payload_of(connection) == {
        "archive": "s3://b/old",
        "tables": ["hero"],
        "dry_run": True,
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--until", "soon"), "--until: 'soon' is no time of the day"),
        (("--retention-days", "hero"), "'hero' is no TABLE=DAYS"),
        (("--retention-days", "hero=x"), "--retention-days"),
        (("--stop", " "), "--stop needs a reason"),
        (("--stop", "now", "--go"), "contradict each other"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_sentence(
    cli: Cli, words: tuple[str, ...], said: str
) -> None:
    result = cli("purge", *words)

    assert result.exit_code == 2
    assert said in sentence(result)


def test_the_switch_stops_purges_and_lets_them_go_on(cli: Cli) -> None:
    stopped = cli("purge", "--stop", "month end")
    lifted, again = cli("purge", "--go"), cli("purge", "--go", "--json")

    assert "stop at their next batch" in stopped.stdout
    assert "may go on" in lifted.stdout
    assert json.loads(again.stdout) == {"stopped": False, "changed": False}
    assert cli("jobs", "--json").stdout == ""
