"""`bulwark update`, `delete` and `restore`, carried out by a worker."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import Cli, make_cli, sentence
from tests.workers import environment, workers
from worker.testing.databases import Databases
from worker.testing.servers import RedisDatabases

pytestmark = pytest.mark.once

HEROES = "external_id,name,age\nh1,Ann,17\nh2,Bob,30\nh3,Cy,15\n"


@pytest.fixture(scope="module")
def cli(
    bulwark_databases: Databases,
    bulwark_redis_databases: RedisDatabases,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cli]:
    """The command line beside a worker, on a database with three heroes."""
    folder = tmp_path_factory.mktemp("changes")
    (folder / "heroes.csv").write_text(HEROES)
    with (
        bulwark_databases.fresh() as url,
        bulwark_redis_databases.kept() as redis_url,
        workers(folder) as start,
    ):
        start(environment(url, redis_url))
        cli = make_cli(url, redis_url)
        done(cli, "import", "hero", str(folder / "heroes.csv"))
        yield cli


def done(cli: Cli, *words: str, stdin: bytes | None = None) -> dict[str, Any]:
    """The verdicts of a job that is followed to its end."""
    result = cli(*words, "--follow", "--json", stdin=stdin)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["adds_up"]
    verdicts: dict[str, Any] = document["verdicts"]
    return verdicts


def test_rows_are_updated_by_filter_by_key_and_by_file(cli: Cli, tmp_path: Path) -> None:
    minors = ("--filter", "age<18", "--filter", "age>=16")
    assert done(cli, "update", "hero", *minors, "--set", "age=18") == {"updated": 1}
    assert done(cli, "update", "hero", "--row", "1", "--row", "9", "--set", "age=18") == {
        "unchanged": 1,
        "missing": 1,
    }
    assert done(cli, "update", "hero", "--row", "h1", "--key", "external_id", "--set", "age=") == {
        "updated": 1
    }
    patches = tmp_path / "patches.csv"
    patches.write_text("external_id,age\nh2,31\nh3,15\n")
    assert done(cli, "update", "hero", str(patches)) == {"updated": 1, "unchanged": 1}
    stdin = b'{"id": 2, "name": "Rob"}\n{"id": 3}\n'
    assert done(cli, "update", "hero", "-", "--format", "ndjson", stdin=stdin) == {
        "updated": 1,
        "unchanged": 1,
    }


def test_rows_are_deleted_and_restored(cli: Cli) -> None:
    assert done(cli, "delete", "hero", "--filter", "name=Cy") == {"deleted": 1}
    assert done(cli, "delete", "hero", "--filter", "name=Cy") == {}
    assert done(cli, "restore", "hero", "--row", "3", "--dry-run") == {"restored": 1}
    assert done(cli, "restore", "hero", "--row", "3") == {"restored": 1}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("update", "hero", "--row", "1"), "keys and a filter need values to set"),
        (("update", "hero", "--set", "age=1"), "give exactly one of keys, filter, rows and source"),
        (
            ("update", "hero", "--filter", "age", "--set", "age=1"),
            "is no condition such as age>=18",
        ),
        (("update", "hero", "--filter", "agee=1", "--set", "age=1"), "hero has no column 'agee'"),
        (("delete", "hero", "--filter", "age=1", "--key", "email"), "leave out key"),
        (("update", "hero", "--row", "1", "--set", "agee=1"), "hero has no field 'agee'"),
        (
            ("update", "hero", "--row", "1", "--set", "team_id=1"),
            "changed by transfer_heroes alone",
        ),
        (("delete", "hero", "--row", "1", "--key", "name"), "name is no unique key of hero"),
        (("update", "hero", "FILE"), "hero.team_id is changed by transfer_heroes alone"),
        (("delete", "hero", "FILE"), "column 'team_id' has no field in hero"),
        (
            ("delete", "hero", "--row", "1", "--format", "csv", "--in-place"),
            "--format, --in-place: that is about a FILE, and none is given.",
        ),
        (
            ("update", "transfer", "--row", "1", "--set", "hero_id=2"),
            "transfer.hero_id is changed by transfer_heroes alone",
        ),
        (("delete", "heros", "--row", "1"), "did you mean hero?"),
    ],
)
def test_what_cannot_be_done_enqueues_nothing(
    cli: Cli, words: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    file = tmp_path / "moves.csv"
    file.write_text("id,team_id\n1,2\n")
    before = cli("jobs", "--json").stdout
    result = cli(*(str(file) if word == "FILE" else word for word in words))
    assert result.exit_code == 2
    assert said in sentence(result)
    assert cli("jobs", "--json").stdout == before
