"""Who is in which team, under locks, as one order after the other takes effect."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession

from db.orders import ANYWHERE, VERSION_CONFLICT, Anywhere, Move, Order, Refused
from db.refusal import Refusal

_IDS = sa.bindparam("ids", type_=ARRAY(sa.BigInteger))
_LOCK_TEAMS = sa.text(
    """
    SELECT id, name, roster_limit, deleted_at IS NOT NULL AS deleted
      FROM team WHERE id = ANY(:ids) ORDER BY id FOR NO KEY UPDATE
    """
).bindparams(_IDS)
_LOCK_HEROES = sa.text(
    """
    SELECT id, name, team_id, version, deleted_at IS NOT NULL AS deleted
      FROM hero WHERE id = ANY(:ids) ORDER BY id FOR NO KEY UPDATE
    """
).bindparams(_IDS)
_COUNT_HEROES = sa.text(
    """
    SELECT team_id, count(*) FROM hero
     WHERE team_id = ANY(:ids) AND deleted_at IS NULL GROUP BY team_id
    """
).bindparams(_IDS)


@dataclass
class _Team:
    """`heroes` are counted only where a limit makes them matter."""

    id: int
    name: str
    roster_limit: int | None
    deleted: bool
    heroes: int = 0

    def __str__(self) -> str:
        return f"team {self.id} ({self.name})"


@dataclass
class _Hero:
    id: int
    name: str
    team_id: int | None
    version: int
    deleted: bool

    def __str__(self) -> str:
        return f"hero {self.id} ({self.name})"


@dataclass(frozen=True)
class Step:
    """A move as it took effect: the team that the hero left, and his version before that."""

    hero_id: int
    from_team_id: int | None
    to_team_id: int | None
    version: int


async def lock_rosters(session: AsyncSession, orders: Iterable[Order]) -> "Rosters":
    """Lock the teams that the orders name, then the heroes, each by id, and read them.

    Heroes are counted only then: before, others may still have changed teams.
    """
    moves = [move for order in orders for move in order.moves]
    named = {move.to_team_id for move in moves} | {
        move.from_team_id for move in moves if move.from_team_id is not ANYWHERE
    }
    teams = [_Team(*row) for row in await _read(session, _LOCK_TEAMS, named)]
    heroes = await _read(session, _LOCK_HEROES, {move.hero_id for move in moves})
    rosters = Rosters(teams, [_Hero(*row) for row in heroes])
    joined = {move.to_team_id for move in moves}
    limited = {team.id for team in teams if team.roster_limit is not None}
    rosters.count(dict(await _read(session, _COUNT_HEROES, limited & joined)))
    return rosters


async def _read(
    session: AsyncSession, statement: sa.TextClause, ids: Iterable[int | None]
) -> Sequence[Any]:
    known = sorted(number for number in ids if number is not None)
    return [tuple(row) for row in await session.execute(statement, {"ids": known})] if known else []


class Rosters:
    """The locked teams and heroes: what the orders judged so far have made of them."""

    def __init__(self, teams: Iterable[_Team], heroes: Iterable[_Hero]) -> None:
        self._teams = {team.id: team for team in teams}
        self._heroes = {hero.id: hero for hero in heroes}

    def count(self, heroes: Mapping[int, int]) -> None:
        """Say how many live heroes teams have."""
        for team_id, number in heroes.items():
            self._teams[team_id].heroes = number

    def why_not(self, order: Order) -> Refused | None:
        """What stands against the order, if anything does; the first of its moves that is wrong.

        Whether a roster has room is judged by what it is after all moves, so that full teams may
        exchange heroes. One that has too many already may, as long as it gets no more.
        """
        listed: set[int] = set()
        for place, move in enumerate(order.moves):
            if move.hero_id in listed:
                text = f"hero {move.hero_id} is listed twice; name each hero once"
                return Refused(place, Refusal("hero_listed_twice", text, "hero_id"))
            listed.add(move.hero_id)
            if refusal := self._hero_unfit(move) or self._teams_unfit(move) or self._moved(move):
                return Refused(place, refusal)
        return self._without_room(order)

    def _hero_unfit(self, move: Move) -> Refusal | None:
        hero = self._heroes.get(move.hero_id)
        if hero is None:
            return Refusal("unknown_hero", f"there is no hero {move.hero_id}", "hero_id")
        if hero.deleted:
            return Refusal("deleted_hero", f"{hero} is deleted; restore the hero first", "hero_id")
        return None

    def _teams_unfit(self, move: Move) -> Refusal | None:
        named = {"from_team_id": move.from_team_id, "to_team_id": move.to_team_id}
        for column, team_id in named.items():
            if team_id is None or isinstance(team_id, Anywhere):
                continue
            team = self._teams.get(team_id)
            if team is None:
                return Refusal("unknown_team", f"there is no team {team_id}", column)
            if team.deleted:
                way = (
                    "let its heroes come from anywhere"
                    if column == "from_team_id"
                    else "restore it"
                )
                return Refusal("deleted_team", f"{team} is deleted; {way}", column)
        return None

    def _moved(self, move: Move) -> Refusal | None:
        """What is wrong with where the hero is, or with what somebody else has made of him."""
        hero = self._heroes[move.hero_id]
        start = hero.team_id if isinstance(move.from_team_id, Anywhere) else move.from_team_id
        if start == move.to_team_id:
            text = f"{hero} would leave and join {self._name(start)}; name two different teams"
            return Refusal("same_team", text, "to_team_id")
        if move.expect_version not in (None, hero.version):
            text = f"{hero} is at version {hero.version}, not at the expected {move.expect_version}"
            return Refusal(VERSION_CONFLICT, text, "version")
        if hero.team_id != start:
            wrong = "no free agent" if start is None else f"not in {self._name(start)}"
            text = f"{hero} is in {self._name(hero.team_id)}, and {wrong}"
            return Refusal("not_in_from_team", text, "from_team_id")
        return None

    def _name(self, team_id: int | None) -> str:
        if team_id is None:
            return "no team"
        return str(self._teams.get(team_id, f"team {team_id}"))

    def _without_room(self, order: Order) -> Refused | None:
        joining: dict[int, list[int]] = defaultdict(list)
        leaving = Counter(self._heroes[move.hero_id].team_id for move in order.moves)
        for place, move in enumerate(order.moves):
            if move.to_team_id is not None:
                joining[move.to_team_id].append(place)
        for team_id, places in joining.items():
            team = self._teams[team_id]
            if team.roster_limit is None:
                continue
            room = max(team.roster_limit - team.heroes, 0) + leaving[team_id]
            if len(places) > room:
                text = (
                    f"{team} has {team.heroes} of at most {team.roster_limit} heroes, and no room "
                    f"for {self._heroes[order.moves[places[room]].hero_id]}"
                )
                return Refused(places[room], Refusal("roster_full", text, "to_team_id"))
        return None

    def take_effect(self, order: Order) -> list[Step]:
        """Move the heroes of an order against which nothing stands."""
        return [self._step(move) for move in order.moves]

    def _step(self, move: Move) -> Step:
        hero = self._heroes[move.hero_id]
        step = Step(hero.id, hero.team_id, move.to_team_id, hero.version)
        for team_id, change in ((hero.team_id, -1), (move.to_team_id, +1)):
            if team_id in self._teams:
                self._teams[team_id].heroes += change
        hero.team_id = move.to_team_id
        hero.version += 1
        return step
