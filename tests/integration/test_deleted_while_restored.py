"""Rows that come back while what they refer to is just being deleted."""

import asyncio
from collections.abc import Mapping

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from jobs.restore_rows import RestoreRows
from jobs.soft_delete_rows import SoftDeleteRows
from tests.inprocess import Bench
from tests.stage import connected, waiting_for_a_lock
from tests.workers import until

CLUB = """
    INSERT INTO team (name) VALUES ('Red'), ('Blue');
    INSERT INTO hero (name, email, team_id, deleted_at) VALUES ('Ann', 'ann@x', 1, '2020-01-01');
    INSERT INTO membership (hero_id, team_id, role, deleted_at) VALUES (1, 2, 'r', '2020-01-01');
"""
TWO_WAIT = """
    SELECT count(*) = 2 FROM pg_stat_activity
     WHERE datname = current_database() AND wait_event_type = 'Lock'
"""
LEFT_ALONE = """
    SELECT 'hero' FROM hero JOIN team ON team.id = team_id
     WHERE hero.deleted_at IS NULL AND team.deleted_at IS NOT NULL
     UNION ALL
    SELECT 'role' FROM membership AS role JOIN team ON team.id = team_id
     WHERE role.deleted_at IS NULL AND team.deleted_at IS NOT NULL
"""


@pytest.mark.parametrize(
    ("team_id", "counts"),
    [(1, {"rejected": 1}), (2, {"deleted": 1})],
    ids=["the hero's team", "a team of a role that comes back along"],
)
async def test_a_team_deleted_while_a_hero_comes_back_leaves_nobody_alone(
    sessions: async_sessionmaker[AsyncSession],
    database_url: str,
    connection: asyncpg.Connection,
    team_id: int,
    counts: Mapping[str, int],
) -> None:
    """The restoring has looked at everything, and waits to write the hero, when the other begins.

    It waits for somebody who takes the hero's address, and then does not.
    """
    await connection.execute(CLUB)
    restorer, deleter = Bench(sessions, database_url), Bench(sessions, database_url)

    async def is_held_up_or_done() -> bool:
        return deleting.done() or bool(await connection.fetchval(TWO_WAIT))

    async with connected(database_url) as other:
        address = other.transaction()
        await address.start()
        await other.execute("INSERT INTO hero (name, email) VALUES ('Other', 'ann@x')")
        restoring = asyncio.create_task(restorer.run(RestoreRows(table="hero", keys=[1])))
        await until(lambda: waiting_for_a_lock(sessions), "the hero waits for the address")
        deletion = SoftDeleteRows(table="team", keys=[team_id])
        deleting = asyncio.create_task(deleter.run(deletion))
        await until(is_held_up_or_done, "the deletion is held up, or done")
        await address.rollback()

    assert await restorer.counts(await restoring) == {"restored": 1}
    assert await deleter.counts(await deleting) == counts
    assert await connection.fetch(LEFT_ALONE) == []
