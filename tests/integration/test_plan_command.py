"""`bulwark import --plan`: what it guesses, that its command works, and that it writes nothing."""

import asyncio
import gzip
import json
import os
import shlex
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.command_line import Cli, make_cli, sentence
from tests.stage import connected
from tests.workers import ROOT

pytestmark = pytest.mark.once

FOOTBALL = ROOT.parent / "shared" / "data" / "football-transfers.csv.gz"
HEROES = (
    "Hero Name,E-Mail,age,Team,shoe size\n"
    "Ann,ann@x.org,30,Red,41\n"
    "Bob,,-1,Red,42\n"
    "Cid,cid@x.org,20,Nowhere,43\n"
)


@pytest.fixture
def cli(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    return make_cli(database_url, None)


def query(database_url: str, sql: str) -> list[Any]:
    async def fetch() -> list[Any]:
        async with connected(database_url) as connection:
            return [tuple(row) for row in await connection.fetch(sql)]

    return asyncio.run(fetch())


def plan(cli: Cli, *words: str, stdin: bytes | None = None) -> dict[str, Any]:
    result = cli("import", "--plan", *words, "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def targets(document: dict[str, Any]) -> dict[str, str | None]:
    return {one["column"]: one["target"] for one in document["columns"]}


def test_model_columns_and_command_are_guessed_from_the_header(cli: Cli, database_url: str) -> None:
    query(database_url, "INSERT INTO team (name) VALUES ('Red')")
    Path("heroes 1.csv").write_text(HEROES)

    document = plan(cli, "heroes 1.csv")

    assert document["model"] == "hero"
    assert targets(document) == {
        "Hero Name": "name",
        "E-Mail": "email",
        "age": "age",
        "Team": "team.name",
        "shoe size": None,
    }
    assert shlex.split(document["command"]) == document["words"]
    assert document["words"][:4] == ["bulwark", "import", "hero", "heroes 1.csv"]


def test_the_first_rejects_are_those_that_the_job_will_have(cli: Cli, database_url: str) -> None:
    query(database_url, "INSERT INTO team (name) VALUES ('Red')")
    Path("heroes.csv").write_text(HEROES)

    document = plan(cli, "heroes.csv")

    assert [(one["line"], one["column"], one["code"]) for one in document["rejects"]] == [
        (3, "age", "invalid"),
        (4, "Team", "missing_reference"),
    ]
    assert document["sample"] == {"rows": 3, "valid": 1, "not_selected": 0, "rejected": 2}


def test_for_rows_of_other_tables_that_are_missing_the_command_that_brings_them_is_named(
    cli: Cli, database_url: str
) -> None:
    Path("heroes.csv").write_text("name,club\nAnn,Red\nBob,Blue\n")

    (hint, *_) = plan(cli, "heroes.csv", "--map", "club=team.name")["hints"]

    told, _, command = hint.partition(", or import them first, as with ")
    assert told == "rows name 2 team rows that are not there: add --on-missing create"
    assert cli(*shlex.split(command)[1:]).exit_code == 0
    assert "--ignore name" in command
    ((table,),) = query(database_url, "SELECT payload ->> 'table' FROM bulwark.job")
    assert table == "team"


@pytest.mark.parametrize(
    ("name", "text", "encoding", "typed"),
    [
        ("x.csv", "name;club\nJosé;Água\nAnn;Red\n", "cp1252", ()),
        ("x.csv", "name|club\nJosé|Água\n", "utf-16", ("--encoding", "utf-16")),
        ("x.txt", "name\tclub\nJosé\tÁgua\n", "utf-8", ("--delimiter", r"\t")),
        ("x.json", '{"name": "José", "club": "Água"}\n', "utf-8", ()),
        ("x.csv", "name,club,kind\nJosé,Água,in\n", "utf-8", ("--where", "kind=in")),
    ],
)
def test_the_command_for_missing_parents_reads_the_input_as_the_plan_did(
    cli: Cli, database_url: str, name: str, text: str, encoding: str, typed: tuple[str, ...]
) -> None:
    Path(name).write_bytes(text.encode(encoding))
    (hint, *_) = plan(cli, "hero", name, "--map", "club=team.name", *typed)["hints"]

    done = cli(*shlex.split(hint.partition("as with ")[2])[1:])

    assert done.exit_code == 0, done.output
    (found,) = query(
        database_url, "SELECT payload -> 'source', payload -> 'where' FROM bulwark.job"
    )
    source, where = map(json.loads, found)
    form = plan(cli, "hero", name, "--map", "club=team.name", *typed)["form"]
    assert {key: source[key] for key in form} == form
    assert where == ({"kind": "in"} if "--where" in typed else {})


def test_for_parents_that_need_more_than_a_name_no_command_is_made_up(cli: Cli) -> None:
    Path("x.csv").write_text("hero,team_id,role\na@b.c,1,lead\n")

    (hint, *_) = plan(cli, "membership", "x.csv", "--map", "hero=hero.email")["hints"]

    assert hint == "rows name 1 hero rows that are not there: import them first"


def test_rows_whose_missing_parents_are_to_be_created_are_tried_as_if_they_were(cli: Cli) -> None:
    long = "x" * 201
    Path("heroes.csv").write_text(
        f"name,age,email,team\nAnn,1,a@b.c,Red\nBob,-1,none,Red\nCid,2,c@d.e,{long}\n"
    )

    document = plan(cli, "heroes.csv", "--on-missing", "create")

    invalid, too_long = document["rejects"]
    assert (invalid["line"], invalid["code"]) == (3, "invalid")
    assert "age: Input should be" in invalid["reason"]
    assert "email: String should match" in invalid["reason"]
    assert (too_long["line"], too_long["code"]) == (4, "missing_reference")
    assert "no team can be created, for name: String should have at most 200" in too_long["reason"]
    assert document["sample"]["valid"] == 1
    assert document["hints"][0] == "rows name 1 team rows that are not there: they are created"


def test_a_field_to_update_that_the_input_does_not_give_is_no_plan(cli: Cli) -> None:
    Path("heroes.csv").write_text("name,age,email\nAnn,1,a@b.c\n")
    words = ("heroes.csv", "--on-conflict", "update", "--update")

    result = cli("import", "--plan", *words, "external_id")

    assert result.exit_code == 2
    assert "--update: the input does not give hero.external_id" in sentence(result)
    assert plan(cli, *words, "age")["sample"]["valid"] == 1


def test_parents_that_cannot_be_created_are_no_plan(cli: Cli) -> None:
    Path("x.csv").write_text("hero,team,role\na@b.c,Red,lead\n")
    words = ("x.csv", "--map", "hero=hero.email", "--on-missing", "create")

    result = cli("import", "membership", "--plan", *words)

    assert result.exit_code == 2
    assert "a hero cannot be created from its email alone" in sentence(result)


def test_a_plan_writes_nothing_and_its_command_enqueues_the_import(
    cli: Cli, database_url: str
) -> None:
    Path("heroes.csv").write_text(HEROES)
    document = plan(cli, "heroes.csv")

    assert query(database_url, "SELECT * FROM bulwark.job") == []
    done = cli(*document["words"][1:])
    assert done.exit_code == 0, done.output
    ((payload,),) = query(database_url, "SELECT payload FROM bulwark.job")
    assert json.loads(payload)["table"] == "hero"


def test_for_people_the_command_is_the_last_line_and_can_be_copied(
    cli: Cli, database_url: str
) -> None:
    query(database_url, "INSERT INTO team (name) VALUES ('Red')")
    Path("it's heroes.csv").write_text(HEROES)

    shown = cli("import", "--plan", "it's heroes.csv").stdout.splitlines()

    assert shlex.split(shown[-1]) == plan(cli, "it's heroes.csv")["words"]
    assert any("the field's name, spelt otherwise" in line for line in shown)
    assert any(line.split()[:3] == ["3", "age", "invalid"] for line in shown)


@pytest.mark.parametrize(
    ("name", "shown"), [(b"caf\xe9 1.csv", r"$'caf\351 1.csv'"), (b"a\n'b.csv", r"$'a\012\'b.csv'")]
)
def test_a_file_with_any_name_is_planned_on_one_line_that_a_shell_reads(
    cli: Cli, name: bytes, shown: str
) -> None:
    file = os.fsdecode(name)
    Path(file).write_text("name,roster_limit\nRed,1\n")

    document = plan(cli, file)
    told = subprocess.run(
        ["bash", "-c", f"printf %s {shown}"], capture_output=True, check=True
    ).stdout

    assert told == name
    assert document["command"] == f"bulwark import team {shown}"
    assert document["words"] == ["bulwark", "import", "team", file]
    assert cli("import", "--plan", file).stdout.splitlines()[-1] == document["command"]
    assert cli(*document["words"][1:]).exit_code == 0


def test_options_that_were_given_are_kept_and_only_the_rest_is_guessed(
    cli: Cli, database_url: str
) -> None:
    Path("x.csv").write_text("a,b,mail,kind\nAnn,3,a@b.c,in\nBob,4,,out\n")
    given = (
        "--map a=name --where kind=in --on-conflict skip --ignore b --priority 3 --max-rejects 9"
    )

    document = plan(cli, "Hero", "x.csv", *given.split())

    words = document["words"]
    assert words[2:4] == ["hero", "x.csv"]
    for option in ("--map", "--where", "--on-conflict", "--ignore", "--priority", "--max-rejects"):
        assert option in words
    assert words.count("a=name") == words.count("mail=email") == words.count("--ignore") == 1
    assert document["sample"]["not_selected"] == 1
    assert cli(*words[1:]).exit_code == 0
    (row,) = query(database_url, "SELECT priority, payload ->> 'on_conflict' FROM bulwark.job")
    assert row == (3, "skip")


def test_a_column_whose_values_are_names_of_teams_refers_to_them_whatever_it_is_called(
    cli: Cli, database_url: str
) -> None:
    query(database_url, "INSERT INTO team (name) VALUES ('Red'), ('Blue')")
    Path("x.csv").write_text("name,age,side\nAnn,1,Red\nBob,2,Blue\n")

    document = plan(cli, "x.csv")

    assert targets(document)["side"] == "team.name"
    assert document["sample"]["valid"] == 2


@pytest.mark.parametrize(("rows", "selects"), [(2, False), (19, False), (20, True)])
def test_a_column_selects_rows_if_these_are_many_more_than_its_values(
    cli: Cli, rows: int, selects: bool
) -> None:
    lines = [f"Ann {number},{('in', 'out')[number % 2]}\n" for number in range(rows)]
    Path("heroes.csv").write_text("name,movement\n" + "".join(lines))

    hints = plan(cli, "heroes.csv")["hints"]

    assert any("--where movement=in" in hint for hint in hints) is selects


def test_the_command_for_stdin_reads_stdin(cli: Cli, database_url: str) -> None:
    text = b'{"name": "Ann", "club": "Red"}\n'

    document = plan(cli, "hero", "-", "--map", "club=team.name", stdin=text)

    assert document["file"] == "-"
    assert document["command"] == "bulwark import hero - --map club=team.name --format ndjson"
    parents = shlex.split(document["hints"][0].partition("as with ")[2])
    assert parents[:4] == ["bulwark", "import", "team", "-"]
    for words in (parents, document["words"]):
        assert cli(*words[1:], stdin=text).exit_code == 0
    assert len(query(database_url, "SELECT * FROM bulwark.job")) == 2


def test_a_column_of_the_fields_name_whose_values_do_not_fit_is_left_out(cli: Cli) -> None:
    Path("x.csv").write_text("name,age,email\nAnn,young,a@b.c\nBob,old,b@c.d\n")

    document = plan(cli, "x.csv")

    (age,) = [one for one in document["columns"] if one["column"] == "age"]
    assert age["target"] is None
    assert "2 of its 2 values do not fit hero.age" in age["why"]
    assert document["sample"]["valid"] == 2
    assert cli(*document["words"][1:]).exit_code == 0


def test_of_two_columns_for_one_field_none_is_taken_and_both_are_named(cli: Cli) -> None:
    Path("x.csv").write_text("name,age,E-Mail,e mail\nAnn,1,a@b.c,d@e.f\n")

    document = plan(cli, "x.csv")

    assert targets(document)["E-Mail"] is targets(document)["e mail"] is None
    (doubt,) = document["doubts"]
    assert "hero.email may be given by several" in doubt
    assert "--map E-Mail=email or --map 'e mail=email'" in doubt


def test_two_models_that_fit_equally_well_are_both_named(cli: Cli) -> None:
    Path("x.csv").write_text("name\nRed\n")

    result = cli("import", "--plan", "x.csv")

    assert result.exit_code == 2
    assert "hero and team fit x.csv equally well" in sentence(result)


def test_the_name_of_the_file_decides_between_two_models(cli: Cli) -> None:
    Path("teams-2026.csv").write_text("name\nRed\n")

    assert plan(cli, "teams-2026.csv")["model"] == "team"


def test_a_model_whose_table_is_not_there_yet_is_not_thought_of(
    cli: Cli, database_url: str
) -> None:
    Path("x.csv").write_text("name,age\nAnn,1\n")
    with_others = make_cli(database_url, None, model_modules="tests.unusual_models")

    assert plan(with_others, "x.csv")["model"] == "hero"


def test_when_no_model_fits_the_nearest_are_named_with_what_they_lack(cli: Cli) -> None:
    Path("x.csv").write_text("foo,age\nRed,1\n")

    result = cli("import", "--plan", "x.csv")

    assert result.exit_code == 2
    told = sentence(result)
    assert "no model fits x.csv: hero lacks name" in told
    assert "membership lacks hero_id, team_id and role" in told


def test_a_model_that_was_named_and_lacks_a_field_is_told_as_an_import_tells_it(cli: Cli) -> None:
    Path("x.csv").write_text("foo,age\nRed,1\n")

    result = cli("import", "hero", "x.csv", "--plan")

    assert result.exit_code == 2
    assert "hero.name must be given" in sentence(result)


@pytest.mark.parametrize(
    ("name", "text", "encoding", "words"),
    [
        ("x.csv", "name;age\nJosé;1\nAnn;2\n", "utf-8", "--delimiter ;"),
        ("x.csv", "name;age\nJosé;1\nAnn;2\n", "cp1252", "--encoding cp1252 --delimiter ;"),
        ("x.txt", "name\tage\nJosé\t1\nAnn\t2\n", "utf-16", r"--encoding utf-16 --delimiter \t"),
        ("x.tsv", "name\tage\nJosé\t1\nAnn\t2\n", "utf-8", ""),
        ("x.ndjson", '{"name": "José", "age": 1}\n{"name": "Ann"}\n', "utf-8", ""),
        ("x.json", '{"name": "José", "age": 1}\n{"name": "Ann"}\n', "utf-8", "--format ndjson"),
    ],
)
def test_how_a_file_is_written_is_guessed_and_said_in_the_command(
    cli: Cli, database_url: str, name: str, text: str, encoding: str, words: str
) -> None:
    Path(name).write_bytes(text.encode(encoding))

    document = plan(cli, name)

    assert document["words"] == ["bulwark", "import", "hero", name, *words.split()]
    assert targets(document) == {"name": "name", "age": "age"}
    assert document["sample"]["valid"] == 2
    assert cli(*document["words"][1:]).exit_code == 0


def test_a_parquet_file_says_itself_what_it_is(cli: Cli) -> None:
    rows = pyarrow.table({"name": ["Ann", "Bob"], "age": [1, -1], "born": [date(2000, 1, 1)] * 2})
    parquet.write_table(rows, "x")

    document = plan(cli, "x")

    assert document["form"]["format"] == "parquet"
    assert [one["kind"] for one in document["columns"]] == ["text", "int", "date"]
    assert [one["column"] for one in document["rejects"]] == ["age"]


def test_a_plan_without_a_database_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.csv").write_text(HEROES)

    result = make_cli(None, None)("import", "--plan", "x.csv")

    assert result.exit_code == 4
    assert "Set BULWARK_DATABASE_URL" in sentence(result)


def test_a_plan_reads_only_the_beginning_of_a_file(cli: Cli) -> None:
    rows = "".join(f"Hero {number},1\n" for number in range(50_000)).encode()
    whole = gzip.compress(b"name,age\n" + rows)
    Path("x.csv.gz").write_bytes(whole[: len(whole) // 2])  # the damage is not reached

    document = plan(cli, "x.csv.gz")

    assert document["form"]["compression"] == "gzip"
    assert document["sample"]["rows"] == document["sample"]["valid"] == 1000


def test_the_keys_of_ndjson_are_those_of_its_first_rows(cli: Cli) -> None:
    first = b"".join(b'{"name":"Hero %d"}\n' % number for number in range(1000))
    whole = gzip.compress(first) + gzip.compress(b'{"name":"Ann","late":1}\n' * 100_000)
    Path("heroes.ndjson.gz").write_bytes(whole[:-100])  # the damage is not reached

    document = plan(cli, "heroes.ndjson.gz")

    assert targets(document) == {"name": "name"}
    assert document["sample"]["rows"] == document["sample"]["valid"] == 1000
    (doubt,) = document["doubts"]
    assert "only the keys of the first rows are known" in doubt


@pytest.mark.parametrize("name", ["x.json", "x.ndjson", "x.csv"])
def test_an_array_of_json_is_told_with_the_remedy(cli: Cli, name: str) -> None:
    Path(name).write_text('[{"name": "Ann"}, {"name": "Bob"}]\n')

    result = cli("import", "--plan", name)

    assert result.exit_code == 2
    assert "The input is a JSON array" in sentence(result)


def test_json_with_blanks_is_planned_as_ndjson(cli: Cli) -> None:
    Path("x.json").write_text('{ "name": "Ann", "age": 1 }\n{ "name": "Bob", "age": 2 }\n')

    document = plan(cli, "x.json")

    assert document["words"][4:] == ["--format", "ndjson"]
    assert document["sample"]["valid"] == 2


def test_a_sensitive_value_is_not_shown(cli: Cli) -> None:
    secret = "hush" * 60
    Path("x.csv").write_text(f"name,secret_name,age\nAnn,{secret},1\nBob,x,2\n")

    shown = cli("import", "--plan", "x.csv")

    assert "secret_name: is not valid" in shown.stdout
    assert "hush" not in shown.output


@pytest.mark.skipif(not FOOTBALL.exists(), reason="the real input is not here")
def test_the_transfer_records_are_planned_as_heroes(cli: Cli, database_url: str) -> None:
    document = plan(cli, str(FOOTBALL))

    assert document["model"] == "hero"
    assert {name: to for name, to in targets(document).items() if to} == {
        "name": "name",
        "age": "age",
    }
    assert document["sample"] == {"rows": 1000, "valid": 1000, "not_selected": 0, "rejected": 0}
    assert any("--where movement=in" in hint for hint in document["hints"])
    assert cli(*document["words"][1:]).exit_code == 0


def test_a_watch_tells_a_file_with_any_name_on_one_line(cli: Cli) -> None:
    Path("in").mkdir()
    for name in (b"a\nb.csv", b"caf\xe9.csv"):
        Path("in", os.fsdecode(name)).write_text("name\nRed\n")

    result = cli("import", "team", "--watch", "in", "--once", "--interval-s", "0.05")

    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()
    assert first.startswith(r"a\nb.csv is accepted as job ")
    assert second.startswith("caf\ufffd.csv is accepted as job ")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("hreo", "--watch", "in"), "did you mean hero?"),
        (("team", "--watch", "nowhere"), "There is no folder nowhere to watch"),
        (("team", "x.csv", "--watch", "in"), "leave x.csv out"),
        (("--watch", "in"), "Missing argument 'MODEL'"),
        (("--plan",), "Missing argument"),
        (("team", "--watch", "in", "--in-place"), "--in-place cannot go with it"),
        (("team", "--watch", "in", "--idempotency-key", "k"), "leave --idempotency-key out"),
        (("team", "--watch", "in", "--follow"), "leave one out"),
        (("team", "--watch", "in", "--plan"), "leave one out"),
        (("team", "--watch", "in", "--run-at", "2030-01-01T00:00:00"), "has no time zone"),
        (("team", "--watch", "in", "--chunk-rows", "1000000"), "--chunk-rows"),
        (("team", "x.csv", "--once"), "--once is about --watch"),
    ],
)
def test_a_plan_or_a_watch_that_makes_no_sense_is_refused_at_once(
    cli: Cli, words: tuple[str, ...], told: str
) -> None:
    Path("in").mkdir()

    result = cli("import", *words)

    assert result.exit_code == 2
    assert told in sentence(result)
    assert list(Path("in").iterdir()) == []
