"""Real input, with on_conflict update: each player ends where his last record puts him."""

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from tests.football import ARRIVALS_AS_HEROES, arrivals_in, imported, needs_data, read_records

pytestmark = [needs_data, pytest.mark.once]

UPDATE = ("--on-missing", "create", "--on-conflict", "update")


@pytest.mark.usefixtures("worker")
async def test_each_player_ends_at_the_club_of_his_last_record(
    env: dict[str, str], sessions: async_sessionmaker[AsyncSession]
) -> None:
    arrivals = arrivals_in(read_records())
    players = {one.key: (one.name, one.age, one.club) for one in arrivals}
    verdicts = imported(env, "hero", *ARRIVALS_AS_HEROES, *UPDATE)["verdicts"]
    async with sessions() as session:
        stored = await session.execute(
            sa.text(
                "SELECT h.external_id, h.name, h.age, t.name FROM hero AS h "
                "JOIN team AS t ON t.id = h.team_id"
            )
        )
        assert {key: tuple(rest) for key, *rest in stored} == players
        changed = await session.scalar(
            sa.text("SELECT count(*) FROM bulwark.audit WHERE action = 'update'")
        )
    assert sum(verdicts.values()) == len(arrivals)
    assert verdicts["inserted"] == len(players)
    assert verdicts["updated"] == changed
    assert set(verdicts) <= {"inserted", "updated", "unchanged"}
