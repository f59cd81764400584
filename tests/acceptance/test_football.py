"""Real input through the command line: 138,420 transfer records, as untidy as they came."""

from collections import Counter

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from tests.football import (
    ARRIVALS_AS_HEROES,
    arrivals_in,
    first_of_each_player,
    imported,
    needs_data,
    read_records,
)

pytestmark = needs_data

CLUBS_AS_TEAMS = (
    *("--where", "movement=in", "--map", "club=name", "--ignore", "name"),
    *("--on-conflict", "skip", "--ignore-unknown"),
)
HEROES = (*ARRIVALS_AS_HEROES, "--on-conflict", "skip")


@pytest.mark.usefixtures("worker")
async def test_the_transfer_records_go_in_as_the_csv_module_reads_them_and_only_once(
    env: dict[str, str], sessions: async_sessionmaker[AsyncSession]
) -> None:
    arrivals = arrivals_in(read_records())
    clubs, players = {one.club for one in arrivals}, first_of_each_player(arrivals)
    records = len(arrivals)
    teams = imported(env, "team", *CLUBS_AS_TEAMS)
    heroes = imported(env, "hero", *HEROES)
    again = imported(env, "hero", *HEROES)
    async with sessions() as session:
        stored = await session.execute(
            sa.text(
                "SELECT h.name, h.age, h.external_id, t.name FROM hero AS h "
                "JOIN team AS t ON t.id = h.team_id ORDER BY h.id"
            )
        )
        assert [tuple(row) for row in stored] == players
        names = set(await session.scalars(sa.text("SELECT name FROM team")))
    assert names == clubs
    assert Counter(teams["verdicts"]) == Counter(inserted=len(clubs), skipped=records - len(clubs))
    assert Counter(heroes["verdicts"]) == Counter(
        inserted=len(players), skipped=records - len(players)
    )
    assert Counter(again["verdicts"]) == Counter(skipped=records)
