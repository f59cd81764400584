"""Memberships: the roles that heroes have in teams, many to many, beside their home team."""

from datetime import datetime
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlmodel import Field, Relationship, SQLModel

from db.columns import (
    NAME_MAX_CHARS,
    Identified,
    Name,
    Reference,
    SoftDeletable,
    Timestamped,
    Versioned,
    deleted_first,
    referring,
    unique_among_live,
)

if TYPE_CHECKING:
    from db.models.hero import Hero
    from db.models.team import Team


class MembershipBase(SQLModel):
    hero_id: Reference = Field(
        foreign_key="hero.id",
        index=True,
        sa_type=sa.BigInteger,
        sa_column_kwargs=referring("cascade"),
    )
    team_id: Reference = Field(
        foreign_key="team.id",
        index=True,
        sa_type=sa.BigInteger,
        sa_column_kwargs=referring("cascade"),
    )
    role: Name = Field(sa_type=sa.String(NAME_MAX_CHARS))


class Membership(SoftDeletable, Versioned, Timestamped, MembershipBase, Identified, table=True):
    """A hero may have several roles in one team, each once; one that ended may begin again."""

    __table_args__ = (unique_among_live("hero_id", "team_id", "role"), deleted_first("id"))

    hero: "Hero" = Relationship(back_populates="memberships")
    team: "Team" = Relationship(back_populates="memberships")


class MembershipCreate(MembershipBase):
    model_config = {"extra": "forbid"}


class MembershipPublic(MembershipBase):
    id: int
    created_at: datetime
    updated_at: datetime
    version: int


class MembershipUpdate(SQLModel):
    """What is left out stays as it is."""

    model_config = {"extra": "forbid"}

    hero_id: Reference = Field(default=None)
    team_id: Reference = Field(default=None)
    role: Name = Field(default=None)
