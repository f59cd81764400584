"""The session that work gets is ended by its caller alone."""

from collections.abc import Awaitable, Callable

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.errors import EndsOutside
from db.transaction import transaction

Sessions = async_sessionmaker[AsyncSession]
Ending = Callable[[AsyncSession], Awaitable[None]]
ADD = sa.text("INSERT INTO team (name) VALUES ('Red')")
COUNT = sa.text("SELECT count(*) FROM team")


@pytest.mark.parametrize("end", [AsyncSession.commit, AsyncSession.rollback])
async def test_work_that_ends_its_transaction_itself_is_refused_and_leaves_nothing(
    end: Ending, sessions: Sessions
) -> None:
    async def work(session: AsyncSession) -> None:
        await session.execute(ADD)
        await end(session)

    with pytest.raises(EndsOutside, match="may not commit or roll back its session"):
        await transaction(sessions, work, name="test")
    async with sessions() as session:
        assert await session.scalar(COUNT) == 0


async def test_work_that_swallows_the_refusal_commits_with_its_caller(sessions: Sessions) -> None:
    async def work(session: AsyncSession) -> None:
        await session.execute(ADD)
        with pytest.raises(EndsOutside):
            await session.commit()

    await transaction(sessions, work, name="test")
    async with sessions() as session:
        assert await session.scalar(COUNT) == 1


async def test_work_may_have_savepoints(sessions: Sessions) -> None:
    async def work(session: AsyncSession) -> None:
        async with session.begin_nested():
            await session.execute(ADD)
        undone = await session.begin_nested()
        await session.execute(sa.text("INSERT INTO team (name) VALUES ('Blue')"))
        await undone.rollback()

    await transaction(sessions, work, name="test")
    async with sessions() as session:
        assert await session.scalar(COUNT) == 1


async def test_a_session_of_ones_own_commits_and_rolls_back(sessions: Sessions) -> None:
    async with sessions() as session:
        await session.execute(ADD)
        await session.rollback()
        await session.execute(ADD)
        await session.commit()
        assert await session.scalar(COUNT) == 1
