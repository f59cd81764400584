"""The command line: what it prints, how it ends, and what it never shows."""

import asyncio
import csv
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner, Result

from db.migrations import downgrade
from tests.command_line import Cli, make_cli, sentence
from tests.stage import connected
from tests.workers import ROOT, environment, run_bulwark, workers
from worker.cli import app
from worker.testing.databases import Databases
from worker.testing.servers import RedisDatabases

pytestmark = pytest.mark.once

HEAD = max(path.name[:4] for path in (ROOT / "alembic/versions").glob("0*.py"))
NOWHERE = "postgresql://postgres@/postgres?host=/nonexistent&port=5432"
NO_REDIS = "redis://127.0.0.1:1/0"
TEAMS = "name\nRed\nBlue\n"
HEROES = (
    "external_id,name,age,team\n"
    "a1,Ann,30,Red\n"
    "a2,Bob,-1,Red\n"
    'a3,"Cid, the ""Kid""",20,Nowhere\n'
    "a4,Dee,41,Blue\n"
    "a1,Eve,22,Blue\n"
)
MAPPED = ("--map", "team=team.name")

PAGE = (Path(__file__).parents[2] / "docs/cli.md").read_text()
NAMES = re.findall(r"^## bulwark ([a-z -]+)$", PAGE, re.MULTILINE)


@pytest.fixture
def cli(database_url: str, redis_url: str, in_tmp_path: Path) -> Cli:
    """The command line on servers of the test's own, without a worker."""
    return make_cli(database_url, redis_url)


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Town:
    """Servers with a worker, on which some imports have been done."""

    def __init__(self, cli: Cli, folder: Path, database_url: str) -> None:
        self.cli = cli
        self.folder = folder
        self.database_url = database_url

    def file(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text, newline="")
        return str(path)

    def imported(self, model: str, text: str, *words: str) -> dict[str, Any]:
        """Import to the end, and give the job's document."""
        file = self.file(f"{model}.csv", text)
        result = self.cli("import", model, file, *words, "--follow", "--json")
        document: dict[str, Any] = json.loads(result.stdout)
        return document


@pytest.fixture(scope="module")
def town(
    bulwark_databases: Databases,
    bulwark_redis_databases: RedisDatabases,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Town]:
    folder = tmp_path_factory.mktemp("town")
    with (
        bulwark_databases.fresh() as url,
        bulwark_redis_databases.kept() as redis_url,
        workers(folder) as start,
    ):
        start(environment(url, redis_url, import_folders=str(folder)))
        town = Town(make_cli(url, redis_url), folder, url)
        town.imported("team", TEAMS)
        yield town


@pytest.fixture(scope="module")
def heroes(town: Town) -> dict[str, Any]:
    """An import of five heroes, of whom three are refused, each for another reason."""
    return town.imported("hero", HEROES, *MAPPED, "--actor", "Zoë", "--correlation-id", "c-1")


def last_lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


async def fetch(database_url: str, query: str) -> list[asyncpg.Record]:
    async with connected(database_url) as connection:
        return list(await connection.fetch(query))


# A job and its rows


def test_a_job_is_told_with_its_verdicts_and_their_sum(town: Town, heroes: dict[str, Any]) -> None:
    result = town.cli("job", heroes["job_id"])

    assert result.exit_code == 0
    assert f"job {heroes['job_id']}  insert_rows into hero  succeeded" in result.stdout
    assert "hero.csv" in result.stdout
    assert "by Zoë" in result.stdout
    assert "2 + 3 = 5: every row is accounted for" in result.stdout


def test_the_document_of_a_job_has_its_promised_keys(town: Town, heroes: dict[str, Any]) -> None:
    document = json.loads(town.cli("job", heroes["job_id"], "--json").stdout)

    assert " ".join(document) == (
        "job_id kind queue priority state reason error outcome attempt max_attempts timeout_s "
        "crashes worker_id actor correlation_id created_at run_at started_at finished_at "
        "table_name "
        "source input_bytes reached_end live_workers silent_s uncommitted_rows uncommitted_bytes "
        "pause run_s rows_per_s rows_read rows_not_selected verdicts adds_up chunks done_bytes"
    )
    assert document["state"] == "succeeded"
    assert document["verdicts"] == {"inserted": 2, "rejected": 3}
    assert (document["rows_read"], document["rows_not_selected"]) == (5, 0)
    assert (document["reached_end"], document["adds_up"]) == (True, True)
    assert document["input_bytes"] == document["done_bytes"] == len(HEROES)
    assert (document["actor"], document["correlation_id"]) == ("Zoë", "c-1")


def test_a_job_may_be_named_by_the_end_of_its_id(town: Town, heroes: dict[str, Any]) -> None:
    by_end = town.cli("job", heroes["job_id"][-12:], "--json")

    assert json.loads(by_end.stdout)["job_id"] == heroes["job_id"]


def test_the_beginning_of_an_id_that_several_jobs_share_names_none(
    town: Town, heroes: dict[str, Any]
) -> None:
    twin = heroes["job_id"][:-4] + ("0000" if heroes["job_id"][-4:] != "0000" else "1111")
    asyncio.run(
        fetch(
            town.database_url,
            "INSERT INTO bulwark.job SELECT (jsonb_populate_record(one, jsonb_build_object('id', "
            f"'{twin}'))).* FROM bulwark.job AS one WHERE id = '{heroes['job_id']}'",
        )
    )
    result = town.cli("job", heroes["job_id"][:-4])

    assert result.exit_code == 2
    assert "Several jobs have an id that begins or ends with" in sentence(result)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("abc", "'abc' is no job id"),
        ("not-a-job-at-all", "is no job id"),
        ("00000000", "No job has an id that begins or ends with '00000000'"),
        ("00000000-0000-7000-8000-000000000000", "There is no job 00000000-0000-7000"),
    ],
)
def test_a_job_that_is_not_there_is_bad_input(town: Town, text: str, told: str) -> None:
    result = town.cli("job", text)

    assert result.exit_code == 2
    assert told in sentence(result)


def test_rejects_are_told_with_line_column_code_and_reason(
    town: Town, heroes: dict[str, Any]
) -> None:
    lines = town.cli("rejects", heroes["job_id"]).stdout.splitlines()

    assert [line.split()[:3] for line in lines[1:]] == [
        ["3", "age", "invalid"],
        ["4", "team", "missing_reference"],
        ["6", "external_id", "unique_violation"],
    ]
    assert "'Nowhere'" in lines[2]


def test_rejects_are_given_as_json_lines_without_their_bytes(
    town: Town, heroes: dict[str, Any]
) -> None:
    documents = last_lines(town.cli("rejects", heroes["job_id"], "--json"))

    keys = ["job_id", "row", "line", "chunk", "verdict", "code", "column", "reason"]
    assert [list(one) for one in documents] == [keys] * 3
    assert [(one["row"], one["line"], one["code"]) for one in documents] == [
        (2, 3, "invalid"),
        (3, 4, "missing_reference"),
        (5, 6, "unique_violation"),
    ]


def test_rejects_are_cut_at_the_limit_and_say_so(town: Town, heroes: dict[str, Any]) -> None:
    shown = town.cli("rejects", heroes["job_id"], "--limit", "1")
    documents = last_lines(town.cli("rejects", heroes["job_id"], "--limit", "2", "--json"))

    assert "unique_violation" not in shown.stdout
    assert "and more" in shown.stdout
    assert len(documents) == 2


def test_rejects_are_exported_as_they_came_with_the_reason_before(
    town: Town, heroes: dict[str, Any]
) -> None:
    exported = town.cli("rejects", heroes["job_id"], "--csv", "-").stdout

    header, *rows = exported.splitlines(keepends=True)
    assert header == "bulwark_line,bulwark_reason,external_id,name,age,team\n"
    assert [row.split(",", 1)[0] for row in rows] == ["3", "4", "6"]
    came = HEROES.splitlines(keepends=True)
    assert [row.endswith(f'",{came[n]}') for row, n in zip(rows, (2, 3, 5), strict=True)] == [
        True,
        True,
        True,
    ]
    assert [len(row) for row in csv.reader(io.StringIO(exported))] == [6, 6, 6, 6]


def test_an_export_can_be_mended_and_imported_again(town: Town) -> None:
    text = "external_id,name,age,team\nm1,Ed,1,Red\nm2,Flo,-1,Red\nm3,Gus,2,Rde\n"
    first = town.imported("hero", text, *MAPPED)
    file = town.folder / "rejects.csv"
    told = town.cli("rejects", first["job_id"], "--csv", str(file))
    mended = file.read_text().replace(",Flo,-1,", ",Flo,1,").replace(",Rde\n", ",Red\n")
    again = town.imported("hero", mended, *MAPPED)

    assert "2 rows are in" in told.stdout
    assert first["verdicts"] == {"inserted": 1, "rejected": 2}
    assert again["verdicts"] == {"inserted": 2}
    assert not list(town.folder.glob("*.part"))


def test_a_reason_with_quotes_is_exported_as_one_field(town: Town) -> None:
    job = town.imported("hero", 'name,team\nHal,"the ""Big"" One"\n', *MAPPED)
    exported = town.cli("rejects", job["job_id"], "--csv", "-").stdout
    (document,) = last_lines(town.cli("rejects", job["job_id"], "--json"))

    _, (line, reason, *row) = csv.reader(io.StringIO(exported))
    assert '"Big"' in reason
    assert (line, reason, row) == ("2", document["reason"], ["Hal", 'the "Big" One'])


def test_the_ends_of_lines_are_exported_as_they_came(town: Town) -> None:
    text = "name,age\r\nWin,-1\r\nDos,-2"
    job = town.imported("hero", text)

    exported = town.cli("rejects", job["job_id"], "--csv", "-").stdout_bytes

    assert exported.count(b"\r\n") == 3
    assert exported.endswith(b",Dos,-2\r\n")


def test_a_sensitive_value_is_shown_nowhere_but_in_the_export(town: Town) -> None:
    secret = "hush-" * 50
    job = town.imported("hero", f"name,secret_name\nSue,{secret}\nTim,{secret}\n")
    shown = [
        town.cli(*words, *as_json).stdout
        for words in (("rejects", job["job_id"]), ("job", job["job_id"]), ("jobs",), ("audit",))
        for as_json in ((), ("--json",))
    ]

    assert job["verdicts"] == {"rejected": 2}
    assert "secret_name" in shown[0]
    assert not any("hush" in text for text in shown)
    assert secret in town.cli("rejects", job["job_id"], "--csv", "-").stdout


def test_a_job_without_rejects_says_so_and_exports_the_header(town: Town) -> None:
    job = town.imported("hero", "name,age\nUma,1\n")

    assert "no row" in town.cli("rejects", job["job_id"]).stdout
    exported = town.cli("rejects", job["job_id"], "--csv", "-").stdout
    assert exported == "bulwark_line,bulwark_reason,name,age\n"


def test_a_file_that_cannot_be_written_is_bad_input(town: Town, heroes: dict[str, Any]) -> None:
    result = town.cli("rejects", heroes["job_id"], "--csv", "/nonexistent/x.csv")

    assert result.exit_code == 2
    assert "/nonexistent/x.csv" in sentence(result)


# Lists


def test_jobs_are_listed_newest_first(town: Town, heroes: dict[str, Any]) -> None:
    documents = last_lines(town.cli("jobs", "--json", "--limit", "1000"))

    assert [one["job_id"] for one in documents] == sorted(
        (one["job_id"] for one in documents), reverse=True
    )
    assert last_lines(town.cli("jobs", "--json", "--limit", "1")) == documents[:1]
    (mine,) = [one for one in documents if one["job_id"] == heroes["job_id"]]
    assert " ".join(mine) == (
        "job_id kind queue state reason error attempt table_name created_at run_at started_at "
        "finished_at run_s rows_read rejected"
    )
    assert (mine["table_name"], mine["rows_read"], mine["rejected"]) == ("hero", 5, 3)


def test_jobs_are_listed_by_state_and_queue(town: Town, heroes: dict[str, Any]) -> None:
    file = town.file("later.csv", TEAMS)
    words = ("import", "team", file, "--queue", "night", "--run-at", "2999-01-01T00:00:00Z")
    later = json.loads(town.cli(*words, "--json").stdout)["job_id"]

    def listed(*words: str) -> list[str]:
        return [one["job_id"] for one in last_lines(town.cli("jobs", *words, "--json"))]

    assert listed("--queue", "night") == [later]
    assert listed("--state", "queued") == [later]
    assert later not in listed("--state", "succeeded")
    assert listed("--state", "failed", "--queue", "night") == []


def test_the_list_for_people_names_jobs_so_that_they_can_be_looked_up(
    town: Town, heroes: dict[str, Any]
) -> None:
    shown = town.cli("jobs", "--limit", "1000").stdout

    assert heroes["job_id"][-12:] in shown
    assert "insert_rows hero" in shown


def test_the_audit_tells_who_inserted_what(town: Town, heroes: dict[str, Any]) -> None:
    (entry,) = last_lines(town.cli("audit", "--job", heroes["job_id"], "--json"))

    assert " ".join(entry) == (
        "job_id chunk_no entry_no at xid claim_id kind actor correlation_id action table_name "
        "rows keys before version"
    )
    assert (entry["actor"], entry["correlation_id"]) == ("Zoë", "c-1")
    assert (entry["action"], entry["table_name"], entry["rows"]) == ("insert", "hero", 2)


def test_the_audit_is_chosen_by_table_and_cut_at_the_limit(
    town: Town, heroes: dict[str, Any]
) -> None:
    town.imported("team", "name\nGreen\n")
    teams = last_lines(town.cli("audit", "--table", "team", "--json"))
    newest = last_lines(town.cli("audit", "--limit", "1", "--json"))

    assert {one["table_name"] for one in teams} == {"team"}
    assert len(teams) == 2
    assert newest == teams[:1]
    assert "insert" in town.cli("audit", "--job", heroes["job_id"]).stdout


def test_the_models_are_told_with_columns_and_keys(in_tmp_path: Path) -> None:
    by_name = {one["model"]: one for one in last_lines(make_cli(None, None)("models", "--json"))}

    assert set(by_name) >= {"hero", "team", "membership", "transfer"}
    columns = {one["column"]: one for one in by_name["hero"]["columns"]}
    assert columns["name"]["required"]
    assert columns["secret_name"]["sensitive"]
    assert columns["team_id"]["references"] == "team.id"
    assert not columns["created_at"]["given"]
    assert ["external_id"] in by_name["hero"]["unique"]
    assert ["hero_id", "team_id", "role"] in by_name["membership"]["unique"]


# Importing


def test_an_accepted_import_says_its_id_and_what_to_type_next(cli: Cli, in_tmp_path: Path) -> None:
    (in_tmp_path / "teams.csv").write_text(TEAMS)
    result = cli("import", "Team", "teams.csv")
    waiting = json.loads(cli("jobs", "--json").stdout)

    assert result.exit_code == 0
    assert f"Accepted as job {waiting['job_id']}." in result.stdout
    assert f"bulwark job {waiting['job_id']} --follow" in result.stdout
    assert waiting["state"] == "queued"


def test_a_job_that_nobody_works_on_says_what_is_missing(cli: Cli, in_tmp_path: Path) -> None:
    (in_tmp_path / "teams.csv").write_text(TEAMS)
    job_id = json.loads(cli("import", "team", "teams.csv", "--json").stdout)["job_id"]

    assert "no worker serves the queue default" in cli("job", job_id).stdout


async def test_the_terms_of_an_import_stand_in_its_job(
    cli: Cli, database_url: str, in_tmp_path: Path
) -> None:
    (in_tmp_path / "teams.csv").write_text("name,seen\nRed,1\n")
    terms = "--queue q --priority -9 --attempts 2 --timeout-s 60 --actor me --correlation-id it"
    at = ("--run-at", "2999-01-01T00:00:00+01:00")
    options = "--on-conflict update --on-invalid abort --max-rejects 3 --chunk-rows 7"
    options += " --update name --on-deleted revive --on-missing null --expect-version seen"

    words = ("--atomic", *terms.split(), *at, *options.split())
    await _in_thread(cli, "import", "team", "teams.csv", *words)

    (row,) = await fetch(
        database_url,
        "SELECT queue, priority, max_attempts, timeout_s, actor, correlation_id, run_at::text,"
        " payload ->> 'on_conflict' AS on_conflict, payload ->> 'on_invalid' AS on_invalid,"
        " payload ->> 'max_rejects' AS max_rejects, payload ->> 'chunk_rows' AS chunk_rows,"
        " payload ->> 'update' AS updated, payload ->> 'on_deleted' AS on_deleted,"
        " payload ->> 'on_missing' AS on_missing, payload ->> 'expect_version' AS version,"
        " payload ->> 'atomic' AS atomic"
        " FROM bulwark.job",
    )
    assert tuple(row) == (
        *("q", -9, 2, 60, "me", "it"),
        "2998-12-31 23:00:00+00",
        *("update", "abort", "3", "7"),
        *('["name"]', "revive", "null", "seen", "true"),
    )


async def _in_thread(cli: Cli, *words: str) -> Result:
    """The command line runs an event loop of its own, so it cannot run inside the test's."""
    import asyncio

    result = await asyncio.to_thread(cli, *words)
    assert result.exit_code == 0, result.output
    return result


def test_an_import_is_accepted_once_under_its_key(cli: Cli, in_tmp_path: Path) -> None:
    (in_tmp_path / "teams.csv").write_text(TEAMS)
    words = ("import", "team", "teams.csv", "--idempotency-key", "k")
    first = json.loads(cli(*words, "--json").stdout)
    second = json.loads(cli(*words, "--json").stdout)
    (in_tmp_path / "teams.csv").write_text("name\nGreen\n")
    other = cli(*words)

    assert (first["created"], second["created"]) == (True, False)
    assert first["job_id"] == second["job_id"]
    assert other.exit_code == 2
    assert "was used with another payload" in sentence(other)
    assert len(last_lines(cli("jobs", "--json"))) == 1


def test_rows_are_mapped_filtered_and_completed(town: Town) -> None:
    text = "first,last,years,side,note,kind\nAl,Po,1,Red,x,in\nBo,Po,2,Red,y,out\n"
    words = "--map years=age --map side=team_id.name --map name={first}_{last} --ignore note"
    job = town.imported(
        "hero",
        text,
        *words.split(),
        "--where",
        "kind=in",
        "--set",
        "email=a@b.c",
        "--set",
        "external_id=",
    )

    assert job["verdicts"] == {"inserted": 1}
    assert job["rows_not_selected"] == 1
    assert "1 + 1 = 2" in town.cli("job", job["job_id"]).stdout


def test_a_failed_job_ends_the_command_with_1(town: Town) -> None:
    file = town.file("bad.csv", "name,age\nAl,1\nBo,-1\nCy,3\n")
    result = town.cli("import", "hero", file, "--on-invalid", "abort", "--follow")

    assert result.exit_code == 1
    assert "failed (rejected)" in result.stdout
    assert "1 + 1 + 1 = 3: every row is accounted for" in result.stdout
    assert "Traceback" not in result.output


def test_progress_goes_to_stderr_and_the_end_to_stdout(town: Town) -> None:
    file = town.file("few.csv", "name\nGrey\n")
    result = town.cli("import", "team", file, "--follow")

    assert result.exit_code == 0
    assert "100%" in result.stderr
    assert "100%" not in result.stdout
    assert len(result.stderr.splitlines()) < 10


def test_a_file_is_read_in_place_inside_the_workers_folders(town: Town, tmp_path: Path) -> None:
    outside = tmp_path / "outside.csv"
    outside.write_text("name\nFar\n")

    inside = town.imported("team", "name\nNear\n", "--in-place")
    result = town.cli("import", "team", str(outside), "--in-place", "--follow")

    assert inside["verdicts"] == {"inserted": 1}
    assert result.exit_code == 1
    assert "outside the allowed folders" in result.stdout


def test_a_file_outside_the_folders_known_here_is_refused_at_once(
    cli: Cli, in_tmp_path: Path
) -> None:
    (in_tmp_path / "teams.csv").write_text(TEAMS)
    result = cli("import", "team", "teams.csv", "--in-place", BULWARK_IMPORT_FOLDERS="/srv")

    assert result.exit_code == 2
    assert "outside the allowed folders" in sentence(result)


def test_a_name_that_is_not_utf8_keeps_no_file_from_being_stored(
    cli: Cli, in_tmp_path: Path, database_url: str
) -> None:
    name = os.fsdecode(b"caf\xe9.csv")
    (in_tmp_path / name).write_text(TEAMS)

    result = cli("import", "team", name)

    assert result.exit_code == 0, result.output
    query = "SELECT payload #>> '{source,name}' AS name FROM bulwark.job"
    (found,) = asyncio.run(fetch(database_url, query))
    assert found["name"] == "caf\ufffd.csv"


def test_a_name_that_is_not_utf8_cannot_be_read_in_place(cli: Cli, in_tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.csv")
    (in_tmp_path / name).write_text(TEAMS)

    result = cli("import", "team", name, "--in-place")

    assert result.exit_code == 2
    assert "caf\ufffd.csv is not UTF-8" in sentence(result)
    assert "leave --in-place out" in sentence(result)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("hreo", "ok.csv"), "did you mean hero?"),
        (("hero", "missing.csv"), "missing.csv cannot be opened (No such file"),
        (("hero", "."), "is not a regular file"),
        (("hero", "empty.csv"), "no header"),
        (("hero", "headless.csv"), "column 'Al' has no field in hero"),
        (("hero", "doubled.csv"), "has the name 'name' twice"),
        (("hero", "binary.csv"), "not UTF-8"),
        (("hero", "cut.csv.gz"), "cut off"),
        (("hero", "unknown.csv"), "column 'nmae' has no field in hero"),
        (("hero", "ok.csv", "--map", "club=team.name"), "no column 'club'"),
        (("hero", "ok.csv", "--map", "age=aeg"), "no field 'aeg'; did you mean 'age'?"),
        (("hero", "ok.csv", "--map", "age=team.nmae"), "no column 'nmae'; did you mean 'name'?"),
        (("hero", "ok.csv", "--map", "age=team.version"), "is no unique text"),
        (("hero", "ok.csv", "--map", "age"), "--map 'age' is not of the form LEFT=RIGHT"),
        (("hero", "ok.csv", "--where", "agee=1"), "no column 'agee'; did you mean 'age'?"),
        (("hero", "ok.csv", "--set", "age=1", "--set", "age=2"), "--set names 'age' twice"),
        (("hero", "ok.csv", "--set", "name=x"), "column 'name'"),
        (
            ("team", "ok.csv", "--ignore", "age", "--set", "roster_limit=abc"),
            "--set roster_limit: ",
        ),
        (("team", "ok.csv", "--ignore", "age", "--set", "roster_limit=-3"), "equal to 0, so that"),
        (("hero", "ok.csv", "--run-at", "tomorrow"), "--run-at 'tomorrow' is no ISO time"),
        (("hero", "ok.csv", "--run-at", "2030-01-01T00:00:00"), "has no time zone"),
        (("hero", "ok.csv", "--max-rejects", "-1"), "--max-rejects"),
        (("hero", "ok.csv", "--chunk-rows", "0"), "--chunk-rows"),
        (("hero", "ok.csv", "--priority", "10"), "--priority"),
        (("hero", "ok.csv", "--on-conflict", "replace"), "'reject', 'skip', 'update'"),
        (("hero", "ok.csv", "--update", "age"), "--update and --expect-version need --on-conflict"),
        (
            ("hero", "ok.csv", "--on-conflict", "update", "--update", "emial"),
            "--update: the input does not give hero.emial",
        ),
        (
            ("membership", "by.csv", "--map", "hero=hero.email", "--on-missing", "create"),
            "a hero cannot be created from its email alone",
        ),
        (("hero", "ok.csv", "--folow"), "--follow"),
        (("hero",), "Missing argument 'FILE'"),
    ],
)
def test_a_wrong_import_is_refused_in_one_sentence_and_enqueues_nothing(
    cli: Cli, in_tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    files = {
        "ok.csv": b"name,age\nAl,1\n",
        "by.csv": b"hero,team_id,role\na@b.c,1,lead\n",
        "empty.csv": b"",
        "headless.csv": b"Al\nBo\n",
        "doubled.csv": b"name,name\nAl,Bo\n",
        "binary.csv": b"name,\xff\nAl,1\n",
        "cut.csv.gz": b"\x1f\x8b\x08\x00\x00\x00",
        "unknown.csv": b"name,nmae\nAl,Bo\n",
    }
    for name, content in files.items():
        (in_tmp_path / name).write_bytes(content)

    result = cli("import", *words)

    assert result.exit_code == 2
    assert told in sentence(result)
    assert cli("jobs", "--json").stdout == ""


# Servers and settings


@pytest.mark.parametrize("words", [("jobs",), ("audit",), ("migrate",), ("job", "0" * 32)])
def test_a_command_without_a_database_says_what_to_set(
    in_tmp_path: Path, words: tuple[str, ...]
) -> None:
    result = make_cli(None, None)(*words)

    assert result.exit_code == 4
    assert "Set BULWARK_DATABASE_URL" in sentence(result)


def test_a_worker_without_servers_says_what_to_set(in_tmp_path: Path) -> None:
    result = make_cli(None, None)("worker")

    assert result.exit_code == 4
    assert "Set BULWARK_DATABASE_URL" in sentence(result)
    assert "BULWARK_REDIS_URL" in sentence(result)


def test_an_unknown_variable_ends_every_command(in_tmp_path: Path) -> None:
    result = make_cli(None, None)("models", BULWARK_DATABSE_URL="x")

    assert result.exit_code == 4
    assert "BULWARK_DATABSE_URL is not a setting" in sentence(result)


@pytest.mark.parametrize(
    "words", [("jobs",), ("migrate",), ("import", "team", "teams.csv"), ("rejects", "0" * 32)]
)
def test_a_database_that_is_down_is_told_in_one_sentence(
    redis_url: str, in_tmp_path: Path, words: tuple[str, ...]
) -> None:
    (in_tmp_path / "teams.csv").write_text(TEAMS)
    result = make_cli(NOWHERE, redis_url)(*words)

    assert result.exit_code == 3
    assert "PostgreSQL cannot be reached" in sentence(result)


def test_a_database_that_does_not_exist_is_told_in_one_sentence(
    database_url: str, in_tmp_path: Path
) -> None:
    url = sa.make_url(database_url).set(database="nobody_made_it").render_as_string(False)
    result = make_cli(url, None)("jobs")

    assert result.exit_code == 3
    assert 'database "nobody_made_it" does not exist' in sentence(result)


def test_an_import_is_accepted_while_redis_is_down(
    cli: Cli, database_url: str, in_tmp_path: Path
) -> None:
    (in_tmp_path / "teams.csv").write_text(TEAMS)
    result = make_cli(database_url, NO_REDIS)("import", "team", "teams.csv", "--json")

    assert result.exit_code == 0
    assert json.loads(result.stdout)["job_id"] == json.loads(cli("jobs", "--json").stdout)["job_id"]


@pytest.mark.parametrize("words", [("jobs",), ("import", "team", "teams.csv")])
def test_a_database_that_is_not_migrated_is_told_with_the_remedy(
    cli: Cli, database_url: str, in_tmp_path: Path, words: tuple[str, ...]
) -> None:
    (in_tmp_path / "teams.csv").write_text(TEAMS)
    downgrade(database_url, "base")

    result = cli(*words)

    assert result.exit_code == 4
    assert "bulwark migrate" in sentence(result)


def test_migrate_says_from_where_to_where(cli: Cli, database_url: str) -> None:
    downgrade(database_url, "base")
    first, second = cli("migrate"), cli("migrate")

    assert (first.exit_code, second.exit_code) == (0, 0)
    assert f"from migration none to {HEAD}" in first.stdout
    assert f"at migration {HEAD} already" in second.stdout
    assert cli("jobs").exit_code == 0


@pytest.fixture
async def newer_url(database_url: str) -> str:
    """A database that a newer program has migrated."""
    await fetch(database_url, "UPDATE alembic_version SET version_num = 'from a newer one'")
    return database_url


def test_a_database_of_a_newer_program_is_worked_on_and_never_migrated(
    cli: Cli, newer_url: str, in_tmp_path: Path
) -> None:
    (in_tmp_path / "teams.csv").write_text(TEAMS)

    told, accepted = cli("migrate"), cli("import", "team", "teams.csv")

    assert (told.exit_code, accepted.exit_code) == (0, 0)
    assert "a newer program" in told.stdout
    assert json.loads(cli("health", "--json").stdout)["revision"] == "from a newer one"


def test_health_is_good_with_a_worker(town: Town) -> None:
    result = town.cli("health", "--json")
    document = json.loads(result.stdout)

    assert result.exit_code == 0
    assert list(document) == ["healthy", "faults", "revision", "head", "queues", "pool"]
    assert document["healthy"] is True
    assert document["queues"]["live_workers"] == 1
    assert document["revision"] == document["head"]
    assert document["pool"]["capacity"] == 10
    assert "healthy" in town.cli("health").stdout


def test_health_is_bad_without_a_worker(cli: Cli) -> None:
    result = cli("health")

    assert result.exit_code == 1
    assert "No worker is alive" in result.stdout


def test_health_here_is_good_with_a_worker_of_this_host(town: Town) -> None:
    result = town.cli("health", "--here", "--json")

    assert result.exit_code == 0
    assert json.loads(result.stdout)["queues"]["live_workers_here"] == 1


async def test_health_here_is_bad_with_workers_of_other_hosts_alone(
    cli: Cli, connection: asyncpg.Connection
) -> None:
    await connection.execute(
        "INSERT INTO bulwark.worker (id, host, pid, queues) "
        "VALUES (gen_random_uuid(), 'elsewhere', 1, '{default}')"
    )
    result = await asyncio.to_thread(cli, "health", "--here", "--json")
    (fault,) = json.loads(result.stdout)["faults"]

    assert result.exit_code == 1
    assert f"No worker of this host, {socket.gethostname()}, is alive" in fault
    assert (await asyncio.to_thread(cli, "health")).exit_code == 0


def test_health_tells_of_a_queue_that_no_worker_serves(town: Town) -> None:
    file = town.file("orphan.csv", TEAMS)
    town.cli("import", "team", file, "--queue", "orphans")
    document = json.loads(town.cli("health", "--json").stdout)

    assert document["queues"]["unserved"] == ["orphans"]
    assert "orphans" in document["faults"][0]


def test_health_tells_of_both_servers_that_are_down(in_tmp_path: Path) -> None:
    result = make_cli(NOWHERE, NO_REDIS)("health", "--json")
    database, redis = json.loads(result.stdout)["faults"]

    assert result.exit_code == 1
    assert "PostgreSQL cannot be reached" in database
    assert "Redis cannot be used" in redis


def test_health_tells_of_a_database_that_is_not_migrated(cli: Cli, database_url: str) -> None:
    downgrade(database_url, "base")
    result = cli("health", "--json")

    assert result.exit_code == 1
    assert "bulwark migrate" in json.loads(result.stdout)["faults"][0]


# The process


def test_a_worker_without_redis_ends_in_one_sentence(database_url: str, tmp_path: Path) -> None:
    ended = run_bulwark("worker", env=environment(database_url, NO_REDIS), folder=tmp_path)

    assert ended.returncode == 3
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("bulwark: Redis cannot be used")


def test_a_worker_without_a_database_ends_in_one_sentence(redis_url: str, tmp_path: Path) -> None:
    ended = run_bulwark("worker", env=environment(NOWHERE, redis_url), folder=tmp_path)

    assert ended.returncode == 3
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("bulwark: PostgreSQL cannot be reached")


def test_a_worker_refuses_a_database_that_is_not_at_head(
    database_url: str, env: dict[str, str], tmp_path: Path
) -> None:
    downgrade(database_url, "base")
    ended = run_bulwark("worker", env=env, folder=tmp_path)

    assert ended.returncode == 4
    assert "Traceback" not in ended.stderr
    assert "bulwark migrate" in ended.stderr.splitlines()[-1]


def test_ctrl_c_while_following_leaves_the_job_alone(
    cli: Cli, env: dict[str, str], in_tmp_path: Path
) -> None:
    (in_tmp_path / "teams.csv").write_text(TEAMS)
    command = [sys.executable, "-m", "worker.cli", "import", "team", "teams.csv", "--follow"]
    with subprocess.Popen(
        command,
        env=env,
        cwd=in_tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    ) as following:
        assert following.stderr is not None
        assert "no worker" in following.stderr.readline()
        following.send_signal(signal.SIGINT)
        last_words = following.stderr.read()

    assert following.returncode == 130
    assert "The job goes on" in last_words
    assert "Traceback" not in last_words
    assert json.loads(cli("jobs", "--json").stdout)["state"] == "queued"


def test_the_page_of_commands_has_all_of_them() -> None:
    shown = CliRunner().invoke(app, ["--help"]).stdout

    assert sorted(re.findall(r"^│ ([a-z][a-z-]*) ", shown, re.MULTILINE)) == sorted(
        name for name in NAMES if " " not in name
    )


def test_a_command_that_is_not_there_names_a_near_one(in_tmp_path: Path) -> None:
    result = make_cli(None, None)("imprt")

    assert result.exit_code == 2
    assert "Did you mean 'import'" in sentence(result)


def options_on_the_page(title: str) -> list[str]:
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(--[a-z-]+)`", section, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_of_commands_has_exactly_the_options_of_each(name: str) -> None:
    section = PAGE.split(f"\n## bulwark {name}\n")[1].split("\n## ")[0]
    shown = CliRunner().invoke(app, [*name.split(), "--help"]).stdout

    written = options_on_the_page(f"bulwark {name}")
    if "(#options-of-jobs)" in section:
        written += options_on_the_page("Options of jobs")
    there = re.findall(r"^│ (?:[* ]  )?(--[a-z-]+)", shown, re.MULTILINE)
    assert sorted(written) == sorted(set(there) - {"--help"})


@pytest.mark.parametrize(
    "words",
    [
        *((name, "--limit", "9" * 30) for name in ("audit", "failed", "jobs", "parked")),
        ("parked", "--requeue", "9" * 30),
        ("rejects", "0123456789", "--limit", "9" * 30),
        ("audit", "seal", "--run-at", "0001-01-01T00:00:00+14:00"),
    ],
    ids=" ".join,
)
def test_a_number_or_time_that_no_server_holds_is_refused_in_one_sentence(
    cli: Cli, words: tuple[str, ...]
) -> None:
    result = cli(*words)

    assert result.exit_code == 2
    assert re.search("less than or equal to|outside the years", sentence(result))
