"""Many orders in one transaction end as if each had its own, and as a plain model says."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import asyncpg
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.ledger.audit import read_entries
from db.orders import ANYWHERE, Move, Moved, Order, Refused
from db.transaction import transaction
from db.transfers import transfer
from tests.league import (
    BLUE,
    FULL,
    GOLD,
    GONE,
    GREEN,
    LOST,
    NO_TEAM,
    NOBODY,
    RED,
    found_league,
    origin,
)

pytestmark = pytest.mark.once

Sessions = async_sessionmaker[AsyncSession]
Row = tuple[Any, ...]

# The model: dictionaries, and the rules as they are told to people


@dataclass
class Model:
    """The league as `found_league` makes it."""

    teams: dict[int, int | None] = field(
        default_factory=lambda: {RED: 4, BLUE: None, FULL: 1, GREEN: 2, GOLD: None}
    )
    homes: dict[int, int | None] = field(
        default_factory=lambda: {1: RED, 2: RED, 3: RED, 4: BLUE, 5: FULL, 6: None}
    )
    versions: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(1, 7), 1))
    roles: dict[int, tuple[int, int]] = field(
        default_factory=lambda: {1: (1, RED), 2: (1, RED), 3: (1, BLUE), 5: (4, BLUE), 6: (5, FULL)}
    )
    moved: list[Row] = field(default_factory=list)
    audit: dict[int, list[Row]] = field(default_factory=dict)

    def apply(self, number: int, order: Order) -> Row:
        """What becomes of the order."""
        if why := self._wrong(order.moves):
            return why
        if order.dry_run:
            return ("moved", None, 0)
        first = len(self.moved) + 1
        lines: list[Row] = []
        for move in order.moves:
            lines += self._move(move, order.reason)
        ids = [[number] for number in range(first, len(self.moved) + 1)]
        self.audit[number] = [("insert", "transfer", ids, None, None), *lines]
        return ("moved", (first, len(self.moved)), sum(line[0] == "end" for line in lines))

    def _move(self, move: Move, reason: str | None) -> list[Row]:
        hero, old = move.hero_id, self.homes[move.hero_id]
        lines: list[Row] = [("move", "hero", [[hero]], {"team_id": old}, self.versions[hero])]
        for role in [role for role, place in self.roles.items() if place == (hero, old)]:
            lines.append(("end", "membership", [[role]], {"deleted_at": None}, 1))
            del self.roles[role]
        self.moved.append((hero, old, move.to_team_id, reason))
        self.homes[hero] = move.to_team_id
        self.versions[hero] += 1
        return lines

    def _wrong(self, moves: Sequence[Move]) -> Row | None:
        for place, move in enumerate(moves):
            if code := self._wrong_move(move, [one.hero_id for one in moves[:place]]):
                return (code, place)
        after = self.homes | {move.hero_id: move.to_team_id for move in moves}
        for team in dict.fromkeys(move.to_team_id for move in moves):
            limit = self.teams.get(team or 0)
            if team is None or limit is None:
                continue
            before, now = Counter(self.homes.values())[team], Counter(after.values())[team]
            if now > max(limit, before):
                come = [place for place, move in enumerate(moves) if move.to_team_id == team]
                return ("roster_full", come[len(come) - (now - max(limit, before))])
        return None

    def _wrong_move(self, move: Move, before: list[int]) -> str | None:
        hero = move.hero_id
        start = self.homes.get(hero) if move.from_team_id is ANYWHERE else move.from_team_id
        named = [team for team in (move.from_team_id, move.to_team_id) if isinstance(team, int)]
        rules = {
            "hero_listed_twice": hero in before,
            "unknown_hero": hero == NOBODY,
            "deleted_hero": hero == LOST,
            "unknown_team": next((team for team in named if team not in self.teams), 0) == NO_TEAM,
            "deleted_team": GONE in named,
            "same_team": start == move.to_team_id,
            "version_conflict": move.expect_version not in (None, self.versions.get(hero)),
            "not_in_from_team": self.homes.get(hero) != start,
        }
        return next((code for code, broken in rules.items() if broken), None)


# What the tables hold


@dataclass(frozen=True)
class State:
    """All that transfers may change, without the times themselves."""

    results: list[Row]
    heroes: list[Row]
    roles: list[Row]
    moved: list[Row]
    audit: list[list[Row]]


async def look(connection: asyncpg.Connection, sessions: Sessions, results: list[Row]) -> State:
    async with sessions() as session:
        audit = [
            [
                (
                    one["action"],
                    one["table_name"],
                    one["keys"]["keys"],
                    one["before"],
                    one["version"],
                )
                for one in await read_entries(session, job_id=origin(number).held.job_id)
            ]
            for number in range(len(results))
        ]
    heroes, roles, moved = [
        [tuple(row) for row in await connection.fetch(query)]
        for query in (
            "SELECT id, team_id, version, updated_at > created_at FROM hero ORDER BY id",
            "SELECT id, version, deleted_at > created_at FROM membership ORDER BY id",
            "SELECT hero_id, from_team_id, to_team_id, reason FROM transfer ORDER BY id",
        )
    ]
    return State(results, heroes, roles, moved, audit)


def said(result: Moved | Refused) -> Row:
    if isinstance(result, Refused):
        return (result.refusal.code, result.place)
    return ("moved", result.transfers, result.roles_ended)


def modelled(orders: Sequence[Order]) -> State:
    model = Model()
    results = [model.apply(number, order) for number, order in enumerate(orders)]
    versions = model.versions.items()
    heroes = [(hero, model.homes[hero], version, version > 1) for hero, version in versions]
    ended = {role for role in (1, 2, 3, 5, 6) if role not in model.roles}
    roles: list[Row] = [(role, 1 + (role in ended), role in ended or None) for role in range(1, 7)]
    roles[3] = (4, 1, True)
    audit = [model.audit.get(number, []) for number in range(len(orders))]
    return State(results, [*heroes, (LOST, RED, 1, False)], roles, model.moved, audit)


async def carried_out(
    connection: asyncpg.Connection, sessions: Sessions, batches: Sequence[Sequence[Order]]
) -> State:
    """What a new league is like after these orders, each batch of them in one transaction."""
    await found_league(connection)
    await connection.execute("TRUNCATE bulwark.audit")
    results: list[Row] = []
    for orders in batches:
        done = await transaction(sessions, partial(transfer, orders=orders), name="test")
        results += map(said, done)
    return await look(connection, sessions, results)


# Orders of every kind

TEAMS = [GOLD, GREEN, BLUE, FULL, RED]
heroes = st.sampled_from([1, 2, 3, 4, 5, 6] * 5 + [LOST, NOBODY])
joined = st.sampled_from([*TEAMS * 6, None, None, GONE, NO_TEAM])
left = st.sampled_from([ANYWHERE] * 20 + [None, *TEAMS, GONE, NO_TEAM])
versions = st.sampled_from([None] * 10 + [1, 1, 2, 3])
one_move = st.builds(Move, heroes, joined, left, versions)
moves = st.lists(one_move, min_size=1, max_size=3, unique_by=lambda move: move.hero_id)
careless = st.lists(one_move, min_size=2, max_size=3)
swaps = st.tuples(heroes, heroes, st.permutations(TEAMS)).map(
    lambda drawn: [Move(drawn[0], drawn[2][0], ANYWHERE), Move(drawn[1], drawn[2][1], ANYWHERE)]
)
asked = st.tuples(
    moves | swaps,
    st.sampled_from([None, "winter", "summer"]),
    st.sampled_from([False] * 7 + [True]),
)


@settings(
    max_examples=80,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # an example is many transactions
)
@given(drawn=st.lists(asked, min_size=4, max_size=12))
async def test_many_orders_in_one_transaction_end_as_each_in_its_own(
    connection: asyncpg.Connection,
    sessions: Sessions,
    drawn: list[tuple[list[Move], str | None, bool]],
) -> None:
    orders = [
        Order(origin(number), moves, reason, dry_run=dry_run)
        for number, (moves, reason, dry_run) in enumerate(drawn)
    ]
    together = await carried_out(connection, sessions, [orders])
    apart = await carried_out(connection, sessions, [[order] for order in orders])

    assert together == modelled(orders)
    assert apart == together
