"""Heroes: each with at most one home team."""

from datetime import datetime
from typing import TYPE_CHECKING, Optional

import sqlalchemy as sa
from sqlmodel import Field, Relationship, SQLModel

from db.columns import (
    EMAIL_MAX_CHARS,
    NAME_MAX_CHARS,
    SENSITIVE,
    Count,
    Email,
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
    from db.models.membership import Membership
    from db.models.team import Team
    from db.models.transfer import Transfer


class HeroBase(SQLModel):
    name: Name = Field(sa_type=sa.String(NAME_MAX_CHARS))
    age: Count | None = Field(default=None, description="in years")
    email: Email | None = Field(default=None, sa_type=sa.String(EMAIL_MAX_CHARS))
    external_id: Name | None = Field(
        default=None, sa_type=sa.String(NAME_MAX_CHARS), description="the name given elsewhere"
    )
    team_id: Reference | None = Field(
        default=None,
        foreign_key="team.id",
        index=True,
        sa_type=sa.BigInteger,
        sa_column_kwargs=referring("refuse", changed_by="transfer_heroes"),
    )


class HeroSecrets(SQLModel):
    """What goes in and never out."""

    secret_name: Name | None = Field(
        default=None, sa_type=sa.String(NAME_MAX_CHARS), sa_column_kwargs=SENSITIVE
    )


class Hero(SoftDeletable, Versioned, Timestamped, HeroSecrets, HeroBase, Identified, table=True):
    __table_args__ = (
        sa.CheckConstraint("age >= 0", name="age_not_negative"),
        unique_among_live("email"),
        unique_among_live("external_id"),
        deleted_first("id"),
    )

    team: Optional["Team"] = Relationship(back_populates="heroes")
    memberships: list["Membership"] = Relationship(back_populates="hero", passive_deletes="all")
    transfers: list["Transfer"] = Relationship(back_populates="hero", passive_deletes="all")


class HeroCreate(HeroSecrets, HeroBase):
    model_config = {"extra": "forbid"}


class HeroPublic(HeroBase):
    id: int
    created_at: datetime
    updated_at: datetime
    version: int


class HeroUpdate(SQLModel):
    """What is left out stays as it is."""

    model_config = {"extra": "forbid"}

    name: Name = Field(default=None)
    secret_name: Name | None = None
    age: Count | None = None
    email: Email | None = None
    external_id: Name | None = None
    team_id: Reference | None = None
