"""`bulwark swap`: two teams exchange heroes."""

from dataclasses import dataclass
from typing import Annotated

import typer
from typer import Option

from jobs.swap_heroes import SwapHeroes
from worker import transfer_options as ask
from worker.accepted import enqueue_job
from worker.arguments import as_parameters

TeamA = Annotated[int, Option("--team-a", metavar="ID", min=1, help="One team.")]
TeamB = Annotated[int, Option("--team-b", metavar="ID", min=1, help="The other team.")]
HeroesA = Annotated[
    list[int], Option("--hero-a", metavar="ID", min=1, help="Of team A; repeat it for more.")
]
HeroesB = Annotated[
    list[int], Option("--hero-b", metavar="ID", min=1, help="Of team B; repeat it for more.")
]


def add_to(app: typer.Typer) -> None:
    app.command()(swap)


@dataclass(frozen=True, kw_only=True)
class Given(ask.MovingOptions):
    """What `bulwark swap` was told."""

    team_a: TeamA
    hero_a: HeroesA
    team_b: TeamB
    hero_b: HeroesB


@as_parameters
def swap(_: typer.Context, given: Given) -> None:
    """Exchange heroes of two teams, also of full ones; all of them or none."""
    moves = {
        "team_a_id": given.team_a,
        "hero_ids_a": given.hero_a,
        "team_b_id": given.team_b,
        "hero_ids_b": given.hero_b,
    }
    enqueue_job(given.payload(SwapHeroes, moves), given)
