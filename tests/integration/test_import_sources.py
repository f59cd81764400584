"""`bulwark import` from stdin, from URIs and with declared forms: accepted whole, or not at all."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from typer.testing import CliRunner, Result

from db.ledger.job import job
from tests.command_line import sentence
from tests.gzipped import gzipped
from tests.object_store import object_store
from worker.cli import app
from worker.exit_codes import ExitCode

pytestmark = pytest.mark.once

TEAMS = b"name\nRed\nBlue\n"
Import = Callable[..., Awaitable[Result]]


@pytest.fixture
def import_(env: dict[str, str]) -> Import:
    """`bulwark import team ...`, with what comes through stdin."""

    async def run(*words: str, stdin: bytes = b"", **more: str) -> Result:
        command = ["import", "team", *words]
        invoke = partial(CliRunner().invoke, app, command, input=stdin, env=env | more)
        return await asyncio.to_thread(invoke)

    return run


async def sources(sessions: async_sessionmaker[AsyncSession]) -> list[dict[str, Any]]:
    """The source of each job there is."""
    async with sessions() as session:
        found = await session.scalars(sa.select(job.c.payload["source"]))
        return list(found)


async def test_what_comes_through_stdin_is_spooled_as_what_it_was_recognised_as(
    import_: Import, sessions: async_sessionmaker[AsyncSession]
) -> None:
    stored = gzipped(b'{"name":"Red"}\n')
    result = await import_("-", "--format", "ndjson", stdin=stored)
    assert result.exit_code == ExitCode.OK, result.stderr
    [source] = await sources(sessions)
    told = {name: source[name] for name in ("type", "name", "format", "compression", "columns")}
    assert told == {
        "type": "spooled",
        "name": "stdin",
        "format": "ndjson",
        "compression": "gzip",
        "columns": ["name"],
    }


@pytest.mark.parametrize(
    ("words", "stdin", "complaint"),
    [
        (("-",), gzipped(TEAMS)[:-1], "cut off"),
        (("-",), b"", "no header"),
        (("-", "--in-place"), TEAMS, "stdin cannot be read in place"),
        (("-", "--format", "parquet"), TEAMS, "does not begin with PAR1"),
        (("-", "--encoding", "nope"), TEAMS, "--encoding: 'nope' is no encoding"),
        (("-", "--delimiter", "ab"), TEAMS, "--delimiter: 'ab' is no delimiter"),
        (("x", "--in-place", "--spool"), TEAMS, "contradict each other"),
        (("ftp://host/teams.csv",), b"", "known are file, s3, gs, az"),
    ],
)
async def test_what_cannot_be_imported_is_refused_with_nothing_enqueued(
    words: tuple[str, ...],
    stdin: bytes,
    complaint: str,
    import_: Import,
    sessions: async_sessionmaker[AsyncSession],
) -> None:
    result = await import_(*words, stdin=stdin)
    assert result.exit_code == ExitCode.BAD_INPUT
    assert complaint in sentence(result)
    assert await sources(sessions) == []


@pytest.mark.parametrize(
    ("words", "kind"), [((), "in_place"), (("--in-place",), "in_place"), (("--spool",), "spooled")]
)
async def test_an_object_is_left_where_it_is_unless_it_is_to_be_spooled(
    words: tuple[str, ...],
    kind: str,
    import_: Import,
    sessions: async_sessionmaker[AsyncSession],
) -> None:
    with object_store() as store:
        store.objects["/bucket/teams.tsv"] = TEAMS
        result = await import_("s3://bucket/teams.tsv", *words, **store.environment())
    assert result.exit_code == ExitCode.OK, result.stderr
    [source] = await sources(sessions)
    assert (source["type"], source["format"]) == (kind, "tsv")
    assert source.get("path", source.get("name")) in ("s3://bucket/teams.tsv", "teams.tsv")


async def test_a_store_that_does_not_answer_ends_the_command_like_any_server(
    import_: Import, sessions: async_sessionmaker[AsyncSession]
) -> None:
    with object_store() as store:
        store.refuses = HTTPStatus.SERVICE_UNAVAILABLE
        result = await import_("s3://bucket/teams.csv", **store.environment())
    assert result.exit_code == ExitCode.UNREACHABLE
    assert "s3://bucket/teams.csv cannot be read" in sentence(result)
    assert await sources(sessions) == []


async def test_what_the_name_says_is_fixed_when_a_file_is_left_in_place(
    import_: Import, sessions: async_sessionmaker[AsyncSession], tmp_path: Path
) -> None:
    path = tmp_path / "teams.jsonl"
    path.write_bytes(b'{"name":"Red"}\n')
    result = await import_(path.as_uri(), "--in-place")
    assert result.exit_code == ExitCode.OK, result.stderr
    [source] = await sources(sessions)
    assert (source["path"], source["format"]) == (str(path), "ndjson")
