"""How an input names rows of other tables: by which foreign key, and by which natural key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from db.catalog import LIVE, ForeignKey, TableFacts, UniqueIndex, quote
from jobs._errors import InputError
from jobs._nearest import did_you_mean

Known = Mapping[str, Mapping[str, Any]]
"""For each referencing field: natural key → id of the row it names.

Where it is known that there can be no such row, a Refusal stands in place of the id.
"""

OnMissing = Literal["reject", "create", "null"]
"""What becomes of a row that names, by natural key, a row that is not there."""


@dataclass(frozen=True)
class Reference:
    """A column that names a row of another table by its natural key.

    `target` is the column of that row whose value goes into the field.
    """

    column: str
    index: int
    field: str
    table: str
    key: str
    target: str


def foreign_key(name: str, place: str, model: str, facts: TableFacts) -> ForeignKey:
    """The model's foreign key that is meant by a column of its own or by the table it leads to.

    Raises InputError where that is none or several, or leads to the model's own table; `place` is
    where the name was given.
    """
    keys = [key for key in facts.foreign_keys if len(key.columns) == 1]
    by_column = [key for key in keys if key.columns[0] == name]
    by_table = [key for key in keys if bare_name(key) == name]
    found = by_column or by_table
    if not found:
        known = {bare_name(key) for key in keys} | {key.columns[0] for key in keys}
        raise InputError(
            f"{place}: {model} has no foreign key to {name!r}{did_you_mean(name, known)}"
        )
    if len(found) > 1:
        names = ", ".join(key.columns[0] for key in found)
        raise InputError(f"{place}: several foreign keys lead there; name one of {names}")
    if bare_name(found[0]) == model:
        raise InputError(
            f"{place}: rows of one input cannot name each other; import the parents first, "
            f"then give {found[0].columns[0]}"
        )
    return found[0]


def bare_name(key: ForeignKey) -> str:
    """The name of the table that the key leads to."""
    return key.table.rpartition(".")[2].strip('"')


def natural_key(table: sa.Table, facts: TableFacts, name: str) -> sa.Column[Any]:
    """The column by which an input may name rows of the table: text, and unique.

    Raises InputError on any other.
    """
    columns = table.columns.keys()
    if name not in columns:
        raise InputError(f"{table.name} has no column {name!r}{did_you_mean(name, columns)}")
    column: sa.Column[Any] = table.c[name]
    naming = [one for one in columns if _names_a_row(table.c[one], facts.unique_indexes)]
    if name not in naming:
        keys = ", ".join(naming) or "an id"
        raise InputError(
            f"{table.name}.{name} is no unique text, so it cannot name a row; use {keys}"
        )
    return column


def _names_a_row(column: sa.Column[Any], indexes: Sequence[UniqueIndex]) -> bool:
    kind = column.type
    while isinstance(kind, sa.TypeDecorator):
        kind = kind.impl_instance
    if not isinstance(kind, sa.String) or isinstance(kind, sa.Enum):
        return False
    spelt = ((column.name,), (quote(column.name),))
    return any(one.keys in spelt and one.predicate in (None, LIVE) for one in indexes)
