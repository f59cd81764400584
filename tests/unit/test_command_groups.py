"""Commands that have subcommands: what stands before one of these is never dropped in silence."""

from collections.abc import Iterator

import pytest
import typer

from tests.command_line import make_cli, sentence
from worker.cli import app

NOWHERE = "postgresql://postgres@/postgres?host=/nonexistent&port=5432"


def misplaced() -> Iterator[tuple[str, str, str, str]]:
    """Each option of each group before each of its subcommands, and what has to be said."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # it is a group
    for name, group in commands.items():
        for subcommand, command in getattr(group, "commands", {}).items():
            theirs = {name for own in command.params for name in own.opts}
            for option in group.params:
                (typed,) = option.opts
                said = f"{subcommand} has no {typed}, which is an option of {name} alone."
                if typed in theirs:
                    said = f"{typed} before {subcommand} has no effect; put it behind {subcommand}."
                yield name, typed if option.is_flag else f"{typed} 20", subcommand, said


def test_there_are_groups_with_options_of_their_own() -> None:
    given = {(group, option.split()[0]) for group, option, _, _ in misplaced()}
    assert {("audit", "--job"), ("audit", "--limit"), ("schedule", "--json")} <= given


@pytest.mark.parametrize(("group", "option", "subcommand", "said"), list(misplaced()))
def test_an_option_before_a_subcommand_is_refused_in_one_sentence(
    group: str, option: str, subcommand: str, said: str
) -> None:
    result = make_cli(NOWHERE, None)(group, *option.split(), subcommand)
    assert (sentence(result), result.exit_code) == (said, 2)


def test_a_subcommand_that_there_is_not_is_told_whatever_stands_before_it() -> None:
    result = make_cli(NOWHERE, None)("audit", "--json", "exprot")
    assert sentence(result) == "No such command 'exprot'. Did you mean 'export'?"
    assert result.exit_code == 2
