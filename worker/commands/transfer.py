"""`bulwark transfer`: heroes change teams."""

from dataclasses import dataclass
from typing import Annotated

import typer
from typer import Option

from jobs.transfer_heroes import TransferHeroes
from worker import transfer_options as ask
from worker.accepted import enqueue_job
from worker.arguments import as_parameters

FromTeam = Annotated[
    int | None,
    Option("--from", metavar="ID", min=1, help="The team to leave; otherwise, free agents."),
]


def add_to(app: typer.Typer) -> None:
    app.command()(transfer)


@dataclass(frozen=True, kw_only=True)
class Given(ask.MovingOptions):
    """What `bulwark transfer` was told."""

    hero: ask.HeroIds
    from_: FromTeam = None
    from_anywhere: ask.FromAnywhere = False
    to: ask.ToTeam = None


@as_parameters
def transfer(_: typer.Context, given: Given) -> None:
    """Move heroes from one team to another, all of them or none."""
    moves = {
        "hero_ids": given.hero,
        "from_team_id": given.from_,
        "from_anywhere": given.from_anywhere,
        "to_team_id": given.to,
    }
    enqueue_job(given.payload(TransferHeroes, moves), given)
