"""Models unlike those of the domain: other keys, other types, other constraints.

They have a metadata of their own, so that no migration is missed for them.
"""

import enum
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, ClassVar
from uuid import UUID

import sqlalchemy as sa
from pydantic import Json, StringConstraints, field_validator, model_validator
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, ExcludeConstraint
from sqlmodel import Field, SQLModel

from db.columns import SENSITIVE, SoftDeletable, referring

metadata = sa.MetaData(naming_convention=SQLModel.metadata.naming_convention)


class Unusual(SQLModel):
    metadata: ClassVar[sa.MetaData] = metadata


class Numbered(Unusual):
    id: int | None = Field(
        default=None,
        primary_key=True,
        sa_type=sa.BigInteger,
        sa_column_kwargs={"autoincrement": True},
    )


# A natural key of text


class CountryBase(Unusual):
    code: str = Field(primary_key=True)
    name: str = Field(unique=True)


class Country(CountryBase, table=True): ...


class CountryCreate(CountryBase): ...


class CountryPublic(CountryBase): ...


class CountryUpdate(SQLModel): ...


# A key of two columns


class SeatBase(Unusual):
    hall: str = Field(primary_key=True)
    number: int = Field(primary_key=True)
    guest: str | None = Field(default=None, unique=True)


class Seat(SeatBase, table=True): ...


class SeatCreate(SeatBase): ...


class SeatPublic(SeatBase): ...


class SeatUpdate(SQLModel): ...


# A reference to both columns of that key


class TicketBase(Unusual):
    hall: str | None = None
    number: int | None = None
    price: int = Field(ge=0)


class Ticket(TicketBase, Numbered, table=True):
    __table_args__ = (sa.ForeignKeyConstraint(["hall", "number"], ["seat.hall", "seat.number"]),)


class TicketCreate(TicketBase): ...


class TicketPublic(TicketBase): ...


class TicketUpdate(SQLModel): ...


# A key that the database makes up


class BadgeBase(Unusual):
    label: str = Field(unique=True)


class Badge(BadgeBase, table=True):
    id: UUID | None = Field(
        default=None,
        primary_key=True,
        sa_column_kwargs={"server_default": sa.text("gen_random_uuid()")},
    )


class BadgeCreate(BadgeBase): ...


class BadgePublic(BadgeBase): ...


class BadgeUpdate(SQLModel): ...


# Types that do not go into COPY as they are


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class GadgetBase(Unusual):
    spec: dict[str, Any] | None = Field(default=None, sa_type=JSONB(none_as_null=True))
    colour: Colour = Field(sa_type=sa.Enum(Colour, name="colour", metadata=metadata))
    tags: list[str] = Field(default=[], sa_type=ARRAY(sa.Text))
    price: Decimal | None = Field(default=None, sa_type=sa.Numeric(6, 2))
    name: str | None = Field(default=None, sa_type=sa.String(5))
    small: int | None = Field(default=None, sa_type=sa.SmallInteger)
    whole: int | None = Field(default=None, sa_type=sa.Integer)
    large: int | None = Field(default=None, sa_type=sa.BigInteger)


class Gadget(GadgetBase, Numbered, table=True): ...


class GadgetCreate(GadgetBase):
    spec: Json[dict[str, Any]] | dict[str, Any] | None = None
    tags: Json[list[str]] | list[str] = []


class GadgetPublic(GadgetBase): ...


class GadgetUpdate(SQLModel): ...


# A row below another row


class FolderBase(Unusual):
    id: int = Field(primary_key=True)
    name: str
    parent_id: int | None = Field(default=None, foreign_key="folder.id")


class Folder(FolderBase, table=True): ...


class FolderCreate(FolderBase): ...


class FolderPublic(FolderBase): ...


class FolderUpdate(SQLModel): ...


# Constraints that may be checked as late as COMMIT


class PlaceBase(Unusual):
    position: int
    country: str | None = None


class Place(PlaceBase, Numbered, table=True):
    __table_args__ = (
        sa.UniqueConstraint("position", deferrable=True, initially="DEFERRED"),
        sa.ForeignKeyConstraint(
            ["country"], ["country.code"], deferrable=True, initially="DEFERRED"
        ),
    )


class PlaceCreate(PlaceBase): ...


class PlacePublic(PlaceBase): ...


class PlaceUpdate(SQLModel): ...


# Nulls that are equal, and keys that are expressions


class AccountBase(Unusual):
    email: str
    code: str | None = None
    active: bool = True
    handle: str | None = None


class Account(AccountBase, Numbered, table=True):
    __table_args__ = (
        sa.Index("uq_account_lower_email", sa.text("lower(email)"), unique=True),
        sa.Index("uq_account_code", "code", unique=True, postgresql_nulls_not_distinct=True),
        sa.Index("uq_account_handle", "handle", unique=True, postgresql_where=sa.text("active")),
    )


class AccountCreate(AccountBase): ...


class AccountPublic(AccountBase): ...


class AccountUpdate(SQLModel): ...


# Rows that exclude each other


class BookingBase(Unusual):
    room: str
    first: int
    last: int


class Booking(BookingBase, Numbered, table=True):
    __table_args__ = (
        ExcludeConstraint(
            (sa.text("int4range(first, last)"), "&&"), name="booking_overlap", using="gist"
        ),
        sa.CheckConstraint("first < last", name="in_order"),
    )


class BookingCreate(BookingBase): ...


class BookingPublic(BookingBase): ...


class BookingUpdate(SQLModel): ...


# A column that the database computes


class ItemBase(Unusual):
    count: int
    price: int


class Item(ItemBase, Numbered, table=True):
    __table_args__ = (
        sa.UniqueConstraint("total"),
        sa.CheckConstraint("total < 1000", name="affordable"),
    )

    total: int | None = Field(
        default=None, sa_column=sa.Column(sa.Integer, sa.Computed("count * price", persisted=True))
    )


class ItemCreate(ItemBase): ...


class ItemPublic(ItemBase): ...


class ItemUpdate(SQLModel): ...


# Names that have to be quoted


class OrderBase(Unusual):
    select: str = Field(unique=True)
    Mixed: int | None = None


class Order(OrderBase, Numbered, table=True):
    __table_args__ = (
        sa.CheckConstraint('"Mixed" <> 7', name="not_seven"),
        sa.CheckConstraint(r"""CAST("Mixed" AS text) <> ' \:y'""", name="no_colon"),
    )


class OrderCreate(OrderBase): ...


class OrderPublic(OrderBase): ...


class OrderUpdate(SQLModel): ...


# What a Create class adds to its input, and what it does while it reads it


class NoteBase(Unusual):
    title: str
    slug: str | None = None
    mood: str | None = Field(default=None, sa_column_kwargs={"server_default": "calm"})
    rank: int = 3
    secret: str | None = Field(default=None, sa_column_kwargs=SENSITIVE)


class Note(NoteBase, Numbered, table=True): ...


reading: dict[str, Callable[[], object]] = {}
"""What is to happen when a note of this title is validated; each once."""


class NoteCreate(NoteBase):
    @model_validator(mode="after")
    def _make_slug(self) -> "NoteCreate":
        reading.pop(self.title, lambda: None)()
        if self.title == "refuse":
            raise ValueError("no such title")
        if self.title == "tell":
            raise ValueError(f"{self.secret} is no secret")
        if self.slug is None:
            self.slug = self.title.lower().replace(" ", "-")
        return self


class NotePublic(SQLModel): ...


class NoteUpdate(SQLModel): ...


# References of every kind


class PassBase(Unusual):
    country: str | None = Field(default=None, foreign_key="country.code")
    issuer: str | None = Field(default=None, foreign_key="vault.code")
    account_id: int | None = Field(default=None, foreign_key="account.id", sa_type=sa.BigInteger)


class Pass(PassBase, Numbered, table=True): ...


class PassCreate(PassBase): ...


class PassPublic(PassBase): ...


class PassUpdate(SQLModel): ...


class VaultBase(Unusual):
    code: str = Field(unique=True)
    label: str = Field(unique=True)
    pin: str | None = Field(default=None, unique=True, sa_column_kwargs=SENSITIVE)


class Vault(VaultBase, Numbered, table=True): ...


class VaultCreate(VaultBase): ...


class VaultPublic(SQLModel): ...


class VaultUpdate(SQLModel): ...


# Two tables that differ in the type of a column alone


class GaugeBase(Unusual):
    code: str = Field(unique=True)
    marks: list[int] | None = Field(default=None, sa_type=ARRAY(sa.Integer))
    reading: float | None = None


class Gauge(GaugeBase, Numbered, table=True): ...


class GaugeCreate(GaugeBase): ...


class GaugePublic(SQLModel): ...


class GaugeUpdate(SQLModel): ...


class MeterBase(Unusual):
    code: str = Field(unique=True)
    marks: list[int] | None = Field(default=None, sa_type=ARRAY(sa.Integer))
    reading: int | None = Field(default=None, sa_type=sa.BigInteger)


class Meter(MeterBase, Numbered, table=True): ...


class MeterCreate(MeterBase): ...


class MeterPublic(SQLModel): ...


class MeterUpdate(SQLModel): ...


# A time that nobody says the zone of, and a column with a default


class NoticeBase(Unusual):
    code: str = Field(unique=True)
    at: datetime = Field(sa_type=sa.DateTime)
    urgency: int = Field(default=1, sa_column_kwargs={"server_default": "1"})


class Notice(NoticeBase, Numbered, table=True): ...


class NoticeCreate(NoticeBase): ...


class NoticePublic(SQLModel): ...


class NoticeUpdate(SQLModel): ...


# An instant whose class does not ask for a time zone


class VisitBase(Unusual):
    began_at: datetime


class Visit(VisitBase, Numbered, table=True): ...


class VisitCreate(VisitBase): ...


class VisitPublic(VisitBase): ...


class VisitUpdate(SQLModel): ...


# Rows that are named by a key which their Create class, or nobody but the database, spells anew


class ClubBase(Unusual):
    name: str = Field(unique=True)
    city: str | None = Field(default=None, unique=True)


class Club(ClubBase, Numbered, table=True): ...


class ClubCreate(ClubBase):
    name: Annotated[str, StringConstraints(strip_whitespace=True, to_upper=True, max_length=20)]

    @field_validator("city")
    @classmethod
    def _in_capitals(cls, city: str | None) -> str | None:
        return city and city.upper()


class ClubPublic(ClubBase): ...


class ClubUpdate(SQLModel): ...


class PlayerBase(Unusual):
    name: str
    club_id: int | None = Field(default=None, foreign_key="club.id", sa_type=sa.BigInteger)
    badge_id: UUID | None = Field(default=None, foreign_key="badge.id")


class Player(PlayerBase, Numbered, table=True): ...


class PlayerCreate(PlayerBase): ...


class PlayerPublic(PlayerBase): ...


class PlayerUpdate(SQLModel): ...


# A name that drivers write otherwise, and columns that change with every update


class RateBase(Unusual):
    code: str = Field(unique=True)
    value: int


class Rate(RateBase, Numbered, table=True):
    __tablename__ = "rate in %"

    by_function: datetime | None = Field(
        default=None,
        sa_type=sa.DateTime(timezone=True),
        sa_column_kwargs={"onupdate": lambda: datetime.now(UTC)},
    )
    by_sql: datetime | None = Field(
        default=None,
        sa_type=sa.DateTime(),
        sa_column_kwargs={"onupdate": sa.func.timezone("UTC", sa.func.now())},
    )
    by_value: str | None = Field(default=None, sa_column_kwargs={"onupdate": "it's 100% :id"})
    by_json: dict[str, Any] | None = Field(
        default=None, sa_type=JSONB, sa_column_kwargs={"onupdate": lambda: {"by": ["a", None]}}
    )
    by_itself: int = Field(
        default=0,
        sa_column_kwargs={"server_default": "0", "onupdate": sa.column("by_itself") + 1},
    )


class RateCreate(RateBase): ...


class RatePublic(RateBase): ...


class RateUpdate(SQLModel): ...


# A field that is of another type than its column, beside one that has no form as text


class Point(sa.types.UserDefinedType[Any]):
    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "point"


class ErrandBase(Unusual):
    day: str | None = Field(default=None, sa_type=sa.Date)
    place: list[float] | None = Field(default=None, sa_type=Point)
    tags: list[str] = Field(default=[], sa_type=ARRAY(sa.Text))


class Errand(ErrandBase, Numbered, table=True): ...


class ErrandCreate(ErrandBase): ...


class ErrandPublic(ErrandBase): ...


class ErrandUpdate(SQLModel): ...


# Two tables that refer to each other, and a row that refers to itself


class ShipBase(Unusual):
    name: str


class Ship(SoftDeletable, ShipBase, Numbered, table=True):
    captain_id: int | None = Field(
        default=None,
        sa_column=sa.Column(
            sa.BigInteger,
            sa.ForeignKey("sailor.id", name="fk_ship_captain_id", use_alter=True),
            **referring("refuse"),
        ),
    )
    towed_by: int | None = Field(
        default=None,
        foreign_key="ship.id",
        sa_type=sa.BigInteger,
        sa_column_kwargs=referring("refuse"),
    )


class ShipCreate(ShipBase):
    captain_id: int | None = None
    towed_by: int | None = None


class ShipPublic(ShipCreate): ...


class ShipUpdate(SQLModel):
    captain_id: int | None = None
    towed_by: int | None = None


class SailorBase(Unusual):
    name: str
    ship_id: int | None = Field(
        default=None,
        foreign_key="ship.id",
        sa_type=sa.BigInteger,
        sa_column_kwargs=referring("cascade"),
    )


class Sailor(SoftDeletable, SailorBase, Numbered, table=True): ...


class SailorCreate(SailorBase): ...


class SailorPublic(SailorBase): ...


class SailorUpdate(SQLModel): ...
