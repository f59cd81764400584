"""Two teams exchange heroes, also when both of their rosters are full."""

from collections.abc import Sequence

from pydantic import model_validator
from sqlalchemy.ext.asyncio import AsyncSession

from db.columns import Reference
from db.ledger.audit import Origin
from db.ledger.job import Claim
from db.orders import Move, Order
from jobs._declaration import Outcome, job
from jobs._errors import Rejected
from jobs._transfers import Heroes, MovingHeroes, carry_out, only


class SwapHeroes(MovingHeroes):
    """Which heroes of team A change places with which heroes of team B; numbers may differ."""

    team_a_id: Reference
    hero_ids_a: Heroes
    team_b_id: Reference
    hero_ids_b: Heroes

    @model_validator(mode="after")
    def _makes_sense(self) -> "SwapHeroes":
        self.check_expected([*self.hero_ids_a, *self.hero_ids_b])
        return self

    def order(self, held: Claim) -> Order:
        """What the heroes are to do, in the name of the claim."""
        moves = [
            Move(hero_id, to_team_id, from_team_id, self.expect_versions.get(hero_id))
            for hero_ids, from_team_id, to_team_id in (
                (self.hero_ids_a, self.team_a_id, self.team_b_id),
                (self.hero_ids_b, self.team_b_id, self.team_a_id),
            )
            for hero_id in hero_ids
        ]
        return Order(Origin(held), moves, self.reason, self.dry_run)


async def swap_many(
    session: AsyncSession, orders: Sequence[tuple[SwapHeroes, Claim]]
) -> list[Outcome | Rejected]:
    """Carry out many swaps in one transaction, each as if it were alone."""
    return await carry_out(session, [payload.order(held) for payload, held in orders])


@job(timeout_s=60, batch=swap_many)
async def swap_heroes(session: AsyncSession, payload: SwapHeroes, held: Claim) -> Outcome:
    """Exchange all heroes and end their roles in the teams that they leave, or refuse by name."""
    return only(await swap_many(session, [(payload, held)]))
