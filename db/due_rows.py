"""Rows that are due for removal, what refers to them, and which tables have to come first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db.catalog import TableFacts, quote

ROW = "{row}"
"""Stands in a condition for the name of the row."""


@dataclass(frozen=True)
class Referrer:
    """A foreign key of PostgreSQL: rows of `table` name, by `columns`, `targets` of another row.

    It need not be of a model. One that `acts` deletes or changes its rows along with the other.
    """

    oid: int
    table: str
    columns: tuple[str, ...]
    targets: tuple[str, ...]
    key: tuple[str, ...]
    acts: bool

    @property
    def name(self) -> str:
        """As a person names it: membership.hero_id."""
        return f"{self.table}.{'+'.join(self.columns)}"

    def joined(self, child: str, parent: str) -> str:
        """SQL: that the row `child` refers to the row `parent`."""
        pairs = zip(self.columns, self.targets, strict=True)
        return " AND ".join(f"{child}.{quote(one)} = {parent}.{quote(to)}" for one, to in pairs)


@dataclass(frozen=True)
class DueRows:
    """The rows of a table that meet a condition, in an order that an index should have.

    `table` is SQL. The condition is SQL, too, in which $1 is the cutoff; the order ends with the
    primary key.
    """

    oid: int
    table: str
    table_name: str
    key: tuple[str, ...]
    order: tuple[str, ...]
    condition: str
    cutoff: str
    referrers: tuple[Referrer, ...]
    facts: TableFacts

    def where(self, row: str) -> str:
        """The condition on a row of that name."""
        return self.condition.replace(ROW, row)

    def ordered(self, row: str) -> str:
        """What a row of that name is ordered by, as a list."""
        return ", ".join(f"{row}.{quote(name)}" for name in self.order)

    def parameters(self, first: int) -> str:
        """A place in the order as parameters of text, from that number on."""
        return ", ".join(
            f"CAST(CAST(${first + at} AS text) AS {self.facts.types[name]})"
            for at, name in enumerate(self.order)
        )


async def soft_deleted(session: AsyncSession, facts: TableFacts, cutoff: str) -> DueRows:
    """The rows that were deleted softly before an instant."""
    instant = f"CAST(CAST($1 AS text) AS {facts.types['deleted_at']})"
    return await due_rows(
        session,
        facts,
        ("deleted_at", *facts.primary_key),
        f"{ROW}.deleted_at < {instant}",
        cutoff,
    )


async def due_rows(
    session: AsyncSession, facts: TableFacts, order: Sequence[str], condition: str, cutoff: str
) -> DueRows:
    """The rows of a table that meet a condition, and what refers to them by now."""
    oid = await session.scalar(_OID, {"table": facts.name})
    assert isinstance(oid, int)
    found = await session.execute(_REFERRERS, {"oid": oid})
    referrers = tuple(
        Referrer(
            one.oid, one.table, tuple(one.columns), tuple(one.targets), tuple(one.key), one.acts
        )
        for one in found
    )
    key = facts.primary_key
    name = facts.table_name
    return DueRows(oid, facts.name, name, key, tuple(order), condition, cutoff, referrers, facts)


_OID = sa.text("SELECT CAST(CAST(:table AS regclass) AS oid)")
_REFERRERS = sa.text(
    """
    SELECT con.conrelid AS oid, CAST(con.conrelid AS regclass)::text AS "table",
           con.confdeltype NOT IN ('a', 'r') AS acts,
           ARRAY(SELECT a.attname::text FROM unnest(con.conkey) WITH ORDINALITY AS k (num, pos)
                   JOIN pg_attribute AS a ON a.attrelid = con.conrelid AND a.attnum = k.num
                  ORDER BY k.pos) AS columns,
           ARRAY(SELECT a.attname::text FROM unnest(con.confkey) WITH ORDINALITY AS k (num, pos)
                   JOIN pg_attribute AS a ON a.attrelid = con.confrelid AND a.attnum = k.num
                  ORDER BY k.pos) AS targets,
           ARRAY(SELECT a.attname::text
                   FROM pg_index AS i, unnest(i.indkey) WITH ORDINALITY AS k (num, pos)
                   JOIN pg_attribute AS a ON a.attrelid = con.conrelid AND a.attnum = k.num
                  WHERE i.indrelid = con.conrelid AND i.indisprimary
                  ORDER BY k.pos) AS key
      FROM pg_constraint AS con
     WHERE con.contype = 'f' AND con.confrelid = :oid AND con.conparentid = 0
     ORDER BY con.conrelid::regclass::text, con.conname
    """
)


_CUTOFF = sa.text(
    "SELECT CAST((now() - make_interval(days => :days)) AT TIME ZONE 'UTC' AS text) || '+00'"
)


async def read_cutoffs(session: AsyncSession, days: Mapping[str, int]) -> dict[str, str]:
    """By name, the instant so many days ago by PostgreSQL's clock, as text."""
    return {
        name: (await session.execute(_CUTOFF, {"days": kept})).scalar_one()
        for name, kept in days.items()
    }


_BYTES_A_ROW = sa.text(
    "SELECT pg_table_size(:oid) / greatest(reltuples, 1) FROM pg_class WHERE oid = :oid"
).bindparams(sa.bindparam("oid", type_=sa.BigInteger))


async def bytes_a_row(session: AsyncSession, due: DueRows) -> float:
    """What a row of the table takes on the disk, one or more."""
    size: float = (await session.execute(_BYTES_A_ROW, {"oid": due.oid})).scalar_one()
    return max(size, 1.0)


def in_groups(due: Sequence[DueRows]) -> list[list[DueRows]]:
    """The tables in groups, each before those that it refers to.

    A group of several refers to itself in a circle.
    """
    by_oid = {one.oid: one for one in due}
    children = {one.oid: {by.oid for by in one.referrers} & by_oid.keys() for one in due}
    below = {oid: _reached(oid, children) for oid in by_oid}
    group = {
        oid: min(other for other in by_oid if other == oid or _mutual(oid, other, below))
        for oid in by_oid
    }
    order = TopologicalSorter(
        {group[oid]: {group[one] for one in below[oid]} - {group[oid]} for oid in sorted(by_oid)}
    )
    return [
        [by_oid[oid] for oid in by_oid if group[oid] == first] for first in order.static_order()
    ]


def goes_round(group: Sequence[DueRows]) -> bool:
    """Whether rows of the group may refer to rows of the group, so that one pass is not enough."""
    oids = {one.oid for one in group}
    return any(by.oid in oids for one in group for by in one.referrers)


def _mutual(one: int, other: int, below: dict[int, set[int]]) -> bool:
    return other in below[one] and one in below[other]


def _reached(start: int, children: dict[int, set[int]]) -> set[int]:
    found: set[int] = set()
    pending = [start]
    while pending:
        new = children[pending.pop()] - found
        found |= new
        pending += new
    return found
