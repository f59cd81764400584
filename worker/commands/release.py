"""`bulwark release`: heroes become free agents."""

from dataclasses import dataclass
from typing import Annotated

import typer
from typer import Option

from jobs.transfer_heroes import TransferHeroes
from worker import transfer_options as ask
from worker.accepted import enqueue_job
from worker.arguments import as_parameters

FromTeam = Annotated[int, Option("--from", metavar="ID", min=1, help="The team to leave.")]


def add_to(app: typer.Typer) -> None:
    app.command()(release)


@dataclass(frozen=True, kw_only=True)
class Given(ask.MovingOptions):
    """What `bulwark release` was told."""

    hero: ask.HeroIds
    from_: FromTeam


@as_parameters
def release(_: typer.Context, given: Given) -> None:
    """Let heroes leave their team for none, all of them or none."""
    moves = {"hero_ids": given.hero, "from_team_id": given.from_, "to_team_id": None}
    enqueue_job(given.payload(TransferHeroes, moves), given)
