"""What is asked for when heroes are to change teams, and what became of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from db.ledger.audit import Origin
from db.refusal import Refusal

VERSION_CONFLICT = "version_conflict"


class Anywhere(Enum):
    """Wherever the hero is, be it in a team or in none."""

    ANYWHERE = "anywhere"


ANYWHERE: Final = Anywhere.ANYWHERE


@dataclass(frozen=True)
class Move:
    """One hero is to leave a team for another; None is the team of free agents."""

    hero_id: int
    to_team_id: int | None
    from_team_id: int | Anywhere | None = None
    expect_version: int | None = None


@dataclass(frozen=True)
class Order:
    """Moves that take effect all together or not at all.

    With `dry_run` the order is judged and takes no effect, not even on the orders behind it.
    """

    origin: Origin
    moves: Sequence[Move]
    reason: str | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class Moved:
    """The order took effect, or would, if it had not been a dry run.

    `transfers` are the first and the last id of its Transfer rows; other orders may have ids
    between them.
    """

    transfers: tuple[int, int] | None = None
    roles_ended: int = 0


@dataclass(frozen=True)
class Refused:
    """The order took no effect, because of the move in this place."""

    place: int
    refusal: Refusal

    @property
    def is_conflict(self) -> bool:
        """Whether somebody else was faster, and the order itself may have been right."""
        return self.refusal.code == VERSION_CONFLICT
