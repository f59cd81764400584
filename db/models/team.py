"""Teams: what a hero belongs to."""

from datetime import datetime
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlmodel import Field, Relationship, SQLModel

from db.columns import (
    NAME_MAX_CHARS,
    Count,
    Identified,
    Name,
    SoftDeletable,
    Timestamped,
    Versioned,
    deleted_first,
    unique_among_live,
)

if TYPE_CHECKING:
    from db.models.hero import Hero
    from db.models.membership import Membership
    from db.models.transfer import Transfer


class TeamBase(SQLModel):
    name: Name = Field(sa_type=sa.String(NAME_MAX_CHARS))
    roster_limit: Count | None = Field(default=None, description="null: no limit")


class Team(SoftDeletable, Versioned, Timestamped, TeamBase, Identified, table=True):
    __table_args__ = (
        sa.CheckConstraint("roster_limit >= 0", name="roster_limit_not_negative"),
        unique_among_live("name"),
        deleted_first("id"),
    )

    heroes: list["Hero"] = Relationship(back_populates="team", passive_deletes="all")
    memberships: list["Membership"] = Relationship(back_populates="team", passive_deletes="all")
    arrivals: list["Transfer"] = Relationship(
        back_populates="to_team",
        passive_deletes="all",
        sa_relationship_kwargs={"foreign_keys": "Transfer.to_team_id"},
    )
    departures: list["Transfer"] = Relationship(
        back_populates="from_team",
        passive_deletes="all",
        sa_relationship_kwargs={"foreign_keys": "Transfer.from_team_id"},
    )


class TeamCreate(TeamBase):
    model_config = {"extra": "forbid"}


class TeamPublic(TeamBase):
    id: int
    created_at: datetime
    updated_at: datetime
    version: int


class TeamUpdate(SQLModel):
    """What is left out stays as it is."""

    model_config = {"extra": "forbid"}

    name: Name = Field(default=None)
    roster_limit: Count | None = None
