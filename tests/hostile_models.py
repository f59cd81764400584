"""A model whose table and columns have names that would be SQL, if they were not quoted."""

from typing import Any, ClassVar

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from db.columns import SoftDeletable

metadata = sa.MetaData(naming_convention=SQLModel.metadata.naming_convention)
TABLE = '"; DROP TABLE hero; -- %s :x'
UNIQUE = "select"
NAMES = (
    UNIQUE,
    '"; DROP TABLE hero; --',
    "%s",
    "%(x)s",
    ":x",
    "it's",
    "{name}",
    "a b",
    "Ünïcode",
    "x" * 63,
    "\\",
    "$1",
    "/*",
    "--",
)
"""Columns of text, the first of which is unique."""


class Hostile(SQLModel):
    metadata: ClassVar[sa.MetaData] = metadata


def _model(name: str, *bases: type[SQLModel], **options: Any) -> type[SQLModel]:
    """A class with a field for each name, which no class statement could write."""
    fields = {one: Field(default=None, unique=one == UNIQUE, sa_type=sa.Text) for one in NAMES}
    space = {"__annotations__": dict.fromkeys(NAMES, str | None), "__module__": __name__, **fields}
    if options:
        space["__tablename__"] = TABLE
    metaclass: Any = type(SQLModel)
    made: type[SQLModel] = metaclass(name, bases, space, **options)
    return made


class Numbered(Hostile):
    id: int | None = Field(
        default=None,
        primary_key=True,
        sa_type=sa.BigInteger,
        sa_column_kwargs={"autoincrement": True},
    )


Thing = _model("Thing", SoftDeletable, Numbered, table=True)
ThingCreate = _model("ThingCreate", SQLModel)
ThingPublic = _model("ThingPublic", SQLModel)
ThingUpdate = _model("ThingUpdate", SQLModel)
