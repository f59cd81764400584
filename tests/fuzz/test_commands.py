"""Any words on the command line end in an exit code that is documented, and no traceback."""

import asyncio
import gzip
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import assume, given
from hypothesis import strategies as st
from typer.testing import Result

from tests.command_line import Cli, make_cli
from tests.fuzzing import Tried, fuzzed
from tests.inprocess import Bench
from tests.stage import connected
from worker.cli import app
from worker.exit_codes import ExitCode

ENDLESS = {"worker", "dev", "demo"}
NEVER = {"--follow", "--watch", "--interval-s"}
"""They wait for a worker, or for files."""

HOSTILE = ('"; DROP TABLE team; --', "%s", ":x", "{", "{}", "", " ", "-", "--", "é", "\udc80", "\n")
SENSIBLE = [
    "hero",
    "team",
    "membership",
    "transfer",
    "Hero",
    "job",
    "insert_rows",
    "update_rows",
    "name",
    "age",
    "id",
    "team_id",
    "email",
    "secret_name",
    "name=x",
    "age=5",
    "age=x",
    "x=y",
    "a=b=c",
    "=x",
    "name=",
    "{name}",
    "name={age}",
    "club=team.name",
    "1",
    "2",
    "0",
    "-1",
    "2147483648",
    "9223372036854775808",
    "1e9",
    "nan",
    "inf",
    "csv",
    "ndjson",
    "parquet",
    "utf-8",
    "rot13",
    "reject",
    "skip",
    "update",
    "heroes.csv",
    "heroes.ndjson",
    "heroes.csv.gz",
    "empty.csv",
    "binary.parquet",
    ".",
    "..",
    "folder",
    "pipe",
    "to_pipe",
    "missing",
    "s3://",
    "s3:///x",
    "file:///x",
    "file://h/x",
    "x://y",
    "default",
    "failed",
    "queued",
    "running",
    "2030-01-01",
    "03:00",
    "2030-01-01T00:00:00Z",
    "9999-12-31T23:59:59+00:00",
    "0001-01-01T00:00:00+14:00",
    "01900000",
    "01900000-0000-7000-8000-000000000000",
    "maintain_ledger",
    "ndjson",
    "\\t",
    ",",
    ";;",
    "team=30",
    "hero=x",
    "team=-1",
    '{"table":"hero","rows":[]}',
    '{"age":{"lt":18}}',
    '{"age":"x"}',
    "[]",
    "null",
    "{",
]
OPTIONS = ("--json", "--help", "--nonsense", "-h", "-x", "--")


def _commands(
    group: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    """Each command by its words, with its parameters; a group is one, too."""
    for name, command in sorted(group.commands.items()):
        if name in ENDLESS:
            continue
        yield (*path, name), list(command.params)
        if getattr(command, "commands", None):
            yield from _commands(command, (*path, name))


COMMANDS = dict(_commands(typer.main.get_command(app)))
texts = st.sampled_from(SENSIBLE) | st.sampled_from(SENSIBLE) | st.sampled_from(HOSTILE)
any_text = texts | st.text(st.characters(exclude_characters="\0"), max_size=12)


def _value(option: str) -> st.SearchStrategy[list[str]]:
    return any_text.map(lambda value: [option, value])


def _words(path: tuple[str, ...]) -> st.SearchStrategy[list[str]]:
    """The command with some arguments, options of its own, and words that it does not know."""
    arguments: list[st.SearchStrategy[list[str]]] = []
    options: list[st.SearchStrategy[list[str]]] = [st.sampled_from(OPTIONS).map(lambda o: [o])]
    for parameter in COMMANDS[path]:
        if parameter.param_type_name == "argument":
            likely = st.lists(texts, min_size=1, max_size=1) | st.lists(any_text, max_size=2)
            arguments.append(likely)
        elif not NEVER & set(parameter.opts):
            name = parameter.opts[0]
            options.append(st.just([name]) if parameter.is_flag else _value(name))
    given_ = st.lists(st.one_of(options), max_size=4).map(
        lambda many: list(chain.from_iterable(many))
    )
    known: st.SearchStrategy[list[str]] = st.tuples(*arguments).map(
        lambda many: list(chain.from_iterable(many))
    )
    order = st.permutations([0, 1])
    return st.builds(
        lambda known, given_, order: [
            *path,
            *chain.from_iterable([known, given_][at] for at in order),
        ],
        known,
        given_,
        order,
    )


commands = st.sampled_from(sorted(COMMANDS)).flatmap(_words) | st.lists(any_text, max_size=4)


@pytest.fixture
def cli(
    bench: Bench,
    database_url: str,
    redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Cli:
    """The command line in a folder with files, on servers without a worker."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "heroes.csv").write_text("name,age\nAnn,5\nBob,x\n")
    (tmp_path / "heroes.ndjson").write_text('{"name": "Ann"}\n[]\n')
    (tmp_path / "heroes.csv.gz").write_bytes(gzip.compress(b"name\nAnn\n")[:-3])
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "binary.parquet").write_bytes(b"PAR1" + bytes(range(256)))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_pipe").symlink_to("pipe")
    asyncio.run(_stock(database_url))
    return make_cli(database_url, redis_url)


async def _stock(database_url: str) -> None:
    async with connected(database_url) as connection:
        await connection.execute(
            "INSERT INTO team (name) VALUES ('Red'), ('Blue');"
            "INSERT INTO hero (name, team_id) VALUES ('Ann', 1), ('Bob', 2);"
            "INSERT INTO bulwark.job (id, kind, payload, max_attempts, timeout_s) VALUES"
            " ('01900000-0000-7000-8000-000000000000', 'insert_rows', '[1]', 1, 9),"
            " ('01900000-0000-7000-8000-000000000001', 'é',"
            ' \'{"source": {"text_bytes": "x"}}\', 1, 9)'
        )


def _leads_out(word: str) -> bool:
    """Whether it is a path to something that is not the test's own."""
    return word.startswith(("/", "~", "../")) or "/../" in word


def _is_told(result: Result, words: list[str]) -> None:
    """The command ended as documented: with a code, and when it was refused with one sentence."""
    place = f"{words}\n{result.stdout[-500:]}\n{result.stderr[-2000:]}"
    assert result.exception is None or isinstance(result.exception, SystemExit), (
        f"{place}\n{result.exception!r}"
    )
    assert "Traceback" not in result.stdout + result.stderr, place
    assert result.exit_code in (*ExitCode,), place
    if result.exit_code > ExitCode.FAILED:
        assert result.stderr.startswith("bulwark: "), place
        assert len(result.stderr.splitlines()) == 1, place
    elif result.exit_code == ExitCode.FAILED:
        assert words[0] == "health", place


@fuzzed(500)
@given(words=commands)
def test_any_words_end_in_a_documented_way(words: list[str], cli: Cli, tried: Tried) -> None:
    assume(not any(map(_leads_out, words)))  # what is written there may be a device
    tried.one()
    _is_told(cli(*words), words)
