"""A hero's history: his team, his transfers, his roles, and what the audit tells of him."""

from operator import attrgetter

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.base import ExecutableOption
from sqlmodel import col

from db.ledger.row_history import SEARCHED_LINES, RowHistory, read_row_history
from db.models.hero import Hero, HeroPublic
from db.models.membership import Membership, MembershipPublic
from db.models.team import Team, TeamPublic
from db.models.transfer import Transfer, TransferPublic
from db.reading.public import along, without_secrets


class ToldTransfer(TransferPublic):
    """A transfer with the names of the teams: null where there was none, or it is deleted."""

    from_team_name: str | None
    to_team_name: str | None


class ToldRole(MembershipPublic):
    """A role with the name of the team: null where that is deleted."""

    team_name: str | None


class HeroHistory(HeroPublic):
    """A hero with all that happened to him, the newest first."""

    team: TeamPublic | None
    transfers: list[ToldTransfer]
    roles: list[ToldRole]
    audit: RowHistory


_TABLE: sa.Table = Hero.__table__  # type: ignore[attr-defined]  # SQLAlchemy adds it


async def hero_history(
    session: AsyncSession, hero_id: int, *, searched_lines: int = SEARCHED_LINES
) -> HeroHistory | None:
    """The hero with his history, or None; five statements, however long it is.

    Most of the time it takes goes into the lines of the audit that are searched.
    """
    query = sa.select(Hero).where(col(Hero.id) == hero_id).options(*_eagerly())
    hero = (await session.scalars(query)).one_or_none()
    if hero is None:
        return None
    return HeroHistory.model_validate(
        hero,
        update={
            "team": hero.team and TeamPublic.model_validate(hero.team),
            "transfers": _transfers(hero),
            "roles": _roles(hero),
            "audit": await read_row_history(
                session, _TABLE, (hero_id,), searched_lines=searched_lines
            ),
        },
    )


def _eagerly() -> list[ExecutableOption]:
    transfers = orm.selectinload(along(Hero.transfers))
    roles = orm.selectinload(along(Hero.memberships))
    return [
        *without_secrets(Hero),
        orm.joinedload(along(Hero.team)),
        transfers.joinedload(along(Transfer.from_team)),
        transfers.joinedload(along(Transfer.to_team)),
        roles.joinedload(along(Membership.team)),
    ]


def _transfers(hero: Hero) -> list[ToldTransfer]:
    return [
        ToldTransfer.model_validate(
            one,
            update={"from_team_name": _name(one.from_team), "to_team_name": _name(one.to_team)},
        )
        for one in sorted(hero.transfers, key=attrgetter("transferred_at", "id"), reverse=True)
    ]


def _roles(hero: Hero) -> list[ToldRole]:
    return [
        ToldRole.model_validate(one, update={"team_name": _name(one.team)})
        for one in sorted(hero.memberships, key=attrgetter("id"), reverse=True)
    ]


def _name(team: Team | None) -> str | None:
    return None if team is None else team.name
