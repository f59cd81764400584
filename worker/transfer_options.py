"""The options of the commands that move heroes, and the payloads that they come to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import ValidationError
from typer import Option

from jobs._transfers import MovingHeroes
from worker.arguments import JobOptions, told
from worker.exit_codes import BadInput, first_problem
from worker.import_command import pairs

HeroIds = Annotated[
    list[int], Option("--hero", metavar="ID", min=1, help="A hero to move; repeat it for more.")
]
ToTeam = Annotated[
    int | None,
    Option("--to", metavar="ID", min=1, help="The team to join; otherwise they are released."),
]
FromAnywhere = Annotated[
    bool, Option("--from-anywhere", help="Whatever team they are in, if they are in one.")
]
ExpectVersions = Annotated[
    list[str] | None,
    Option(
        "--expect-version",
        metavar="HERO=VERSION",
        help="Move nobody unless the hero still has this version.",
    ),
]
Reason = Annotated[str | None, Option("--reason", help="What the Transfer rows give as reason.")]
DryRun = Annotated[bool, Option("--dry-run", help="Judge it, and change nothing.")]

M = TypeVar("M", bound=MovingHeroes)
_OPTIONS = {
    "hero_ids": "--hero",
    "from_team_id": "--from",
    "to_team_id": "--to",
    "team_a_id": "--team-a",
    "hero_ids_a": "--hero-a",
    "team_b_id": "--team-b",
    "hero_ids_b": "--hero-b",
    "expect_versions": "--expect-version",
}


@dataclass(frozen=True, kw_only=True)
class MovingOptions(JobOptions):
    """What every command that moves heroes may be told."""

    expect_version: ExpectVersions = None
    reason: Reason = None
    dry_run: DryRun = False

    def payload(self, payload: type[M], moves: Mapping[str, Any]) -> M:
        """What to enqueue. Raises BadInput, naming the option that is wrong."""
        common = told(
            expect_versions=pairs("--expect-version", self.expect_version or ()),
            reason=self.reason,
            dry_run=self.dry_run,
        )
        try:
            return payload.model_validate({**moves, **common})
        except ValidationError as error:
            raise BadInput(first_problem(error, _OPTIONS)) from None
