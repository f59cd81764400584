"""The command line inside the tests' own process, away from every setting but those given."""

import os
from collections.abc import Callable

from typer.testing import CliRunner, Result

from tests.workers import environment
from worker.cli import app

Cli = Callable[..., Result]


def make_cli(database_url: str | None, redis_url: str | None, **settings: str) -> Cli:
    """The command line on these servers."""
    given = environment(database_url or "", redis_url or "", **settings)

    def cli(*words: str, stdin: bytes | None = None, **more: str) -> Result:
        nobody = {name: None for name in os.environ if name.startswith("BULWARK_")}
        return CliRunner().invoke(app, list(words), stdin, {**nobody, **given, **more})

    return cli


def sentence(result: Result) -> str:
    """What stderr says, which has to be one line that begins with the program's name."""
    (line,) = result.stderr.splitlines()
    assert line.startswith("bulwark: ")
    assert result.stdout == ""
    return line.removeprefix("bulwark: ")
