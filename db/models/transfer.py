"""Transfers: the record of each move of a hero between home teams."""

from datetime import datetime
from typing import TYPE_CHECKING, Optional

import sqlalchemy as sa
from sqlmodel import Field, Relationship, SQLModel

from db.columns import (
    NOTE_MAX_CHARS,
    Identified,
    Instant,
    Note,
    Reference,
    SoftDeletable,
    Timestamped,
    Versioned,
    deleted_first,
    referring,
)

if TYPE_CHECKING:
    from db.models.hero import Hero
    from db.models.team import Team


class TransferBase(SQLModel):
    hero_id: Reference = Field(
        foreign_key="hero.id",
        index=True,
        sa_type=sa.BigInteger,
        sa_column_kwargs=referring("leave", changed_by="transfer_heroes"),
    )
    from_team_id: Reference | None = Field(
        default=None,
        foreign_key="team.id",
        index=True,
        sa_type=sa.BigInteger,
        sa_column_kwargs=referring("leave", changed_by="transfer_heroes"),
    )
    to_team_id: Reference | None = Field(
        default=None,
        foreign_key="team.id",
        index=True,
        sa_type=sa.BigInteger,
        sa_column_kwargs=referring("leave", changed_by="transfer_heroes"),
    )
    transferred_at: Instant = Field(
        default=None, nullable=False, sa_column_kwargs={"server_default": sa.func.now()}
    )
    reason: Note | None = Field(default=None, sa_type=sa.String(NOTE_MAX_CHARS))


class Transfer(SoftDeletable, Versioned, Timestamped, TransferBase, Identified, table=True):
    __table_args__ = (deleted_first("id"),)

    hero: "Hero" = Relationship(back_populates="transfers")
    from_team: Optional["Team"] = Relationship(
        back_populates="departures",
        sa_relationship_kwargs={"foreign_keys": "Transfer.from_team_id"},
    )
    to_team: Optional["Team"] = Relationship(
        back_populates="arrivals", sa_relationship_kwargs={"foreign_keys": "Transfer.to_team_id"}
    )


class TransferCreate(TransferBase):
    """Left out, `transferred_at` is the time of the database when the row is written."""

    model_config = {"extra": "forbid"}


class TransferPublic(TransferBase):
    id: int
    created_at: datetime
    updated_at: datetime
    version: int


class TransferUpdate(SQLModel):
    """What is left out stays as it is."""

    model_config = {"extra": "forbid"}

    hero_id: Reference = Field(default=None)
    from_team_id: Reference | None = None
    to_team_id: Reference | None = None
    transferred_at: Instant = Field(default=None)
    reason: Note | None = None
