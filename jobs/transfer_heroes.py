"""Move heroes from one team to another, to a team from nowhere, or out of one."""

from collections.abc import Sequence

from pydantic import model_validator
from sqlalchemy.ext.asyncio import AsyncSession

from db.columns import Reference
from db.ledger.audit import Origin
from db.ledger.job import Claim
from db.orders import ANYWHERE, Move, Order
from jobs._declaration import Outcome, job
from jobs._errors import Rejected
from jobs._transfers import Heroes, MovingHeroes, carry_out, only


class TransferHeroes(MovingHeroes):
    """Which heroes go where: all of them, or none.

    Without `from_team_id` they have to be free agents, unless they may come `from_anywhere`; with
    null in place of `to_team_id` they become free agents.
    """

    hero_ids: Heroes
    from_team_id: Reference | None = None
    to_team_id: Reference | None
    from_anywhere: bool = False

    @model_validator(mode="after")
    def _makes_sense(self) -> "TransferHeroes":
        if self.from_anywhere and self.from_team_id is not None:
            raise ValueError("from_anywhere does not go with from_team_id; give one of them")
        if self.from_team_id is None and self.to_team_id is None and not self.from_anywhere:
            raise ValueError("neither a team to leave nor a team to join is given")
        self.check_expected(self.hero_ids)
        return self

    def order(self, held: Claim) -> Order:
        """What the heroes are to do, in the name of the claim."""
        start = ANYWHERE if self.from_anywhere else self.from_team_id
        moves = [
            Move(hero_id, self.to_team_id, start, self.expect_versions.get(hero_id))
            for hero_id in self.hero_ids
        ]
        return Order(Origin(held), moves, self.reason, self.dry_run)


async def transfer_many(
    session: AsyncSession, orders: Sequence[tuple[TransferHeroes, Claim]]
) -> list[Outcome | Rejected]:
    """Carry out many transfers in one transaction, each as if it were alone."""
    return await carry_out(session, [payload.order(held) for payload, held in orders])


@job(timeout_s=60, batch=transfer_many)
async def transfer_heroes(session: AsyncSession, payload: TransferHeroes, held: Claim) -> Outcome:
    """Move all heroes and end their roles in the teams that they leave, or refuse by name."""
    return only(await transfer_many(session, [(payload, held)]))
