"""A team with its heroes."""

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from db.models.hero import Hero, HeroPublic
from db.models.team import Team, TeamPublic
from db.reading.public import along, without_secrets


class TeamWithHeroes(TeamPublic):
    """A team and the heroes at home in it, in the order of their names."""

    heroes: list[HeroPublic]


async def team_with_heroes(session: AsyncSession, team_id: int) -> TeamWithHeroes | None:
    """The team with all its heroes, or None; two statements, however many there are."""
    heroes = orm.selectinload(along(Team.heroes)).options(*without_secrets(Hero))
    query = sa.select(Team).where(col(Team.id) == team_id).options(heroes)
    team = (await session.scalars(query)).one_or_none()
    if team is None:
        return None
    by_name = sorted(team.heroes, key=lambda one: (one.name, one.id))
    shown = [HeroPublic.model_validate(one) for one in by_name]
    return TeamWithHeroes.model_validate(team, update={"heroes": shown})
