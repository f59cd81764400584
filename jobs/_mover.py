"""Writing the rows of a chunk as transfers: each an order of its own, in input order."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from db.batch import DEFAULT
from db.ledger.audit import Origin
from db.ledger.verdict import Verdict
from db.orders import ANYWHERE, Move, Moved, Order, Refused
from db.outcome import Written
from db.refusal import Refusal
from db.transfers import transfer
from jobs._errors import InputError
from jobs._mapping import Plan
from jobs._prepared import Prepared
from jobs._turn import Turn
from jobs._writer import Ready, Writer


@dataclass(frozen=True)
class MovedRows(Written):
    """Rows whose hero has moved; each is a new Transfer row, too."""

    moved: frozenset[int]
    refused: dict[int, Refusal] = field(default_factory=dict)
    roles_ended: int = 0

    def taken(self) -> Mapping[Verdict, Collection[int]]:
        return {Verdict.MOVED: self.moved}

    @property
    def changed(self) -> Mapping[str, int]:
        return {"insert": len(self.moved)} if self.moved else {}

    @property
    def changed_along(self) -> Mapping[str, Mapping[str, int]]:
        along = {"hero": {"move": len(self.moved)}, "membership": {"end": self.roles_ended}}
        return {table: by for table, by in along.items() if any(by.values())}


def require_teams(plan: Plan, *, from_anywhere: bool) -> None:
    """Raise InputError unless the input says which teams are left and joined, or need not."""
    if not plan.given:
        return  # rows in a payload may be none at all
    if "to_team_id" not in plan.given:
        raise InputError(
            "the input does not say which team a hero joins: map a column to to_team_id, or to "
            "to_team_id.name; in it, no value is a release"
        )
    gives_start = "from_team_id" in plan.given
    if gives_start and from_anywhere:
        raise InputError(
            "heroes may come from anywhere, and yet the input gives from_team_id; --ignore its "
            "column, or leave out --from-anywhere"
        )
    if not gives_start and not from_anywhere:
        raise InputError(
            "the input does not say which team a hero leaves: map a column to from_team_id, or "
            "to from_team_id.name, or let heroes come --from-anywhere"
        )


@dataclass
class Mover(Writer):
    """Moves the heroes that the rows name; with `from_anywhere` the rows do not say from where."""

    from_anywhere: bool = False

    def __post_init__(self) -> None:
        """Raise InputError about an input that does not say who goes from where to where."""
        require_teams(self.plan, from_anywhere=self.from_anywhere)

    async def write(
        self, session: AsyncSession, ready: Ready, prepared: Prepared, turn: Turn
    ) -> MovedRows:
        await turn.may_look()
        origin = Origin(self.claim, ready.part.number)
        orders = [
            self._order(origin, record, prepared.expected.get(at))
            for at, record in enumerate(prepared.records)
        ]
        return _written(await transfer(session, orders)).accounting_for(len(orders))

    def _order(self, origin: Origin, record: Sequence[Any], expected: int | None) -> Order:
        named = zip(self.columns, record, strict=True)
        row: dict[str, Any] = {name: value for name, value in named if value is not DEFAULT}
        start = ANYWHERE if self.from_anywhere else row.get("from_team_id")
        move = Move(row["hero_id"], row.get("to_team_id"), start, expected)
        return Order(origin, [move], row.get("reason"), row.get("transferred_at"))


def _written(results: Sequence[Moved | Refused]) -> MovedRows:
    moved = {at: one for at, one in enumerate(results) if isinstance(one, Moved)}
    refused = {at: one.refusal for at, one in enumerate(results) if isinstance(one, Refused)}
    return MovedRows(frozenset(moved), refused, sum(one.roles_ended for one in moved.values()))
