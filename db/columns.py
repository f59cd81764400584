"""Column sets that tables inherit, the types of their values, and the names of their constraints.

A table lists its bases from the last column to the first, so that its columns come out as id,
its own, then the sets:

    class Hero(SoftDeletable, Versioned, Timestamped, HeroBase, Identified, table=True): ...
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, overload

import sqlalchemy as sa
from pydantic import AwareDatetime, StringConstraints
from sqlalchemy import orm
from sqlmodel import Field, SQLModel

INTEGER_MAX: Final = 2**31 - 1
BIGINT_MAX: Final = 2**63 - 1

SENSITIVE: Final[dict[str, Any]] = {"info": {"sensitive": True}}
"""Give it as `sa_column_kwargs`: the column is masked on every way out of the database."""

OnParentDeleted = Literal["refuse", "cascade", "leave"]
"""What becomes of a row that refers to one that is to be deleted softly."""


def referring(
    on_parent_deleted: OnParentDeleted, *, changed_by: str | None = None
) -> dict[str, Any]:
    """Give it as `sa_column_kwargs` of a foreign key.

    While the row lives: refuse to delete the row that it refers to, delete it along with that, or
    leave it as it is. `changed_by` names the job that alone may change the column of a row that is
    there.
    """
    return {"info": {"on_parent_deleted": on_parent_deleted, "changed_by": changed_by}}


NAME_MAX_CHARS: Final = 200
NOTE_MAX_CHARS: Final = 2000
EMAIL_MAX_CHARS: Final = 254

Name = Annotated[
    str,
    StringConstraints(
        min_length=1, max_length=NAME_MAX_CHARS, pattern=r"^[^\x00]*[^\x00\s][^\x00]*$"
    ),
]
"""Not blank and without NUL; white space at the ends is kept as it came."""

Note = Annotated[
    str, StringConstraints(min_length=1, max_length=NOTE_MAX_CHARS, pattern=r"^[^\x00]*$")
]

Email = Annotated[
    str,
    StringConstraints(max_length=EMAIL_MAX_CHARS, pattern=r"^[^@\s\x00]+@[^@\s\x00]+$"),
]
"""One @ with something on both sides: what a look can tell; only a sent mail proves more."""

Count = Annotated[int, Field(ge=0, le=INTEGER_MAX)]
Reference = Annotated[int, Field(ge=1, le=BIGINT_MAX)]

Instant = Annotated[
    AwareDatetime,
    Field(ge=datetime.min.replace(tzinfo=UTC), le=datetime.max.replace(tzinfo=UTC)),
]
"""With a time zone, and within the years 1 to 9999 of UTC, the zone that it is stored in."""


def _unique_or_plain(index: sa.Index, _table: sa.Table) -> str:
    return "uq" if index.unique else "ix"


NAMING_CONVENTION: Final[dict[str, Any]] = {
    "unique_or_plain": _unique_or_plain,
    "pk": "pk_%(table_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "ix": "%(unique_or_plain)s_%(table_name)s_%(column_0_N_name)s",
}

SQLModel.metadata.naming_convention = NAMING_CONVENTION


class _OwnIdentity(Sequence[sa.Identity]):
    """A new Identity at every reading: SQLModel passes one argument list to all tables."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[sa.Identity]:
        yield sa.Identity(always=False)

    @overload
    def __getitem__(self, index: int) -> sa.Identity: ...
    @overload
    def __getitem__(self, index: slice) -> list[sa.Identity]: ...
    def __getitem__(self, index: int | slice) -> sa.Identity | list[sa.Identity]:
        return list(self)[index]


class Identified(SQLModel):
    """`id`: given by the database unless the row brings its own."""

    id: int | None = Field(
        default=None, primary_key=True, sa_type=sa.BigInteger, sa_column_args=_OwnIdentity()
    )


class Timestamped(SQLModel):
    """`created_at` and `updated_at`, both by the database's clock, whoever writes the row.

    An UPDATE through the ORM or Core sets `updated_at`; ON CONFLICT DO UPDATE and raw SQL have
    to name it.
    """

    created_at: datetime | None = Field(
        default=None, nullable=False, sa_column_kwargs={"server_default": sa.func.now()}
    )
    updated_at: datetime | None = Field(
        default=None,
        nullable=False,
        sa_column_kwargs={"server_default": sa.func.now(), "onupdate": sa.func.now()},
    )


class Versioned(SQLModel):
    """`version`: counts the row's changes, and stops an ORM update of a row read too early.

    The ORM adds `WHERE version = <as read>` to its UPDATE and raises StaleDataError when nobody
    matches. An UPDATE through Core adds one as well; ON CONFLICT DO UPDATE, raw SQL, and a Core
    UPDATE joined to something that has its own `version` must set `version = <table>.version + 1`.
    """

    version: int | None = Field(
        default=None,
        nullable=False,
        sa_column_kwargs={"server_default": sa.text("1"), "onupdate": sa.text("version + 1")},
    )

    @orm.declared_attr.directive
    def __mapper_args__(cls) -> dict[str, Any]:  # noqa: N805 - SQLAlchemy hands over the class
        return {
            "version_id_col": cls.version,
            "version_id_generator": False,
            "eager_defaults": True,
        }


class SoftDeletable(SQLModel):
    """`deleted_at`: when the row was deleted; null while it lives."""

    deleted_at: datetime | None = Field(default=None)


def unique_among_live(*columns: str) -> sa.Index:
    """For `__table_args__`: a deleted row does not keep its values from being used again.

    ON CONFLICT has to repeat the predicate.
    """
    return sa.Index(None, *columns, unique=True, postgresql_where=sa.text("deleted_at IS NULL"))


def deleted_first(*key: str) -> sa.Index:
    """For `__table_args__`: finds deleted rows by age, and costs live rows nothing.

    With the primary key a purge finds the next row at once, however many were deleted together.
    """
    where = sa.text("deleted_at IS NOT NULL")
    return sa.Index(None, "deleted_at", *key, postgresql_where=where)


def changed_by(column: sa.Column[Any]) -> str | None:
    """The job that alone may change the column of a row that is there, if that is so."""
    kind: str | None = column.info.get("changed_by")
    return kind


_INTEGER_BITS = ((sa.SmallInteger, 16), (sa.BigInteger, 64), (sa.Integer, 32))


def integer_range(column: sa.Column[Any] | orm.QueryableAttribute[Any]) -> tuple[int, int] | None:
    """The least and the greatest number that an integer column holds; None for other types."""
    bits = next((bits for kind, bits in _INTEGER_BITS if isinstance(column.type, kind)), None)
    return None if bits is None else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def is_sensitive(column: sa.Column[Any]) -> bool:
    return bool(column.info.get("sensitive", False))
