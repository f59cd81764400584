"""What PostgreSQL itself knows about a table: columns, defaults, and every constraint on a row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncSession

from db.on_update import on_update

LIVE = "(deleted_at IS NULL)"
"""The predicate of an index over the rows that are not deleted, as PostgreSQL spells it."""


@dataclass(frozen=True)
class Column:
    """A column that can be written; `default` is SQL, the identity's sequence included.

    The type is the name that PostgreSQL has for it inside, a domain's that of what it is made
    of; "enum", or "extension" where it is none of PostgreSQL's own. Values of a `comparable`
    one are the same to PostgreSQL only if they look the same.
    """

    name: str
    default: str | None
    not_null: bool
    integer: bool
    sequence: bool
    collated: bool
    comparable: bool
    type: str


@dataclass(frozen=True)
class GeneratedColumn:
    """A column that the database computes; `type` and `expression` are SQL."""

    name: str
    type: str
    expression: str


@dataclass(frozen=True)
class UniqueIndex:
    """A unique index: its key expressions and predicate as SQL over unqualified column names.

    A deferrable one is checked after the statement, and after its foreign keys.
    """

    name: str
    keys: tuple[str, ...]
    predicate: str | None
    nulls_equal: bool
    deferrable: bool


@dataclass(frozen=True)
class Check:
    """A check constraint as SQL over unqualified column names, and the columns it looks at."""

    name: str
    expression: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class ForeignKey:
    """A foreign key; the referenced table is a quoted, qualified name."""

    name: str
    columns: tuple[str, ...]
    table: str
    table_columns: tuple[str, ...]


@dataclass(frozen=True)
class TableFacts:
    """One table, in the order in which PostgreSQL tests its constraints; `name` is SQL.

    `types` are those of all columns, as SQL, of any length and without the rules of a domain;
    `deferrable` tells that some constraint may be checked as late as COMMIT; `arbitrable`, that
    ON CONFLICT can be used, which no unique or exclusion constraint of that kind allows;
    `own_parent`, that a row may reference another row of the same table; `has_triggers`, that row
    triggers of users, on the table or a partition, may fill or change columns, the key included,
    before they are checked, and may leave rows out; `changes_on_update`, that such triggers may
    change other columns than those that an UPDATE sets; `on_update`, what the model writes into
    columns with every update of a row (see `db.on_update`).
    """

    name: str
    table_name: str
    schema_name: str | None
    columns: tuple[Column, ...]
    generated: tuple[GeneratedColumn, ...]
    types: Mapping[str, str]
    primary_key: tuple[str, ...]
    unique_indexes: tuple[UniqueIndex, ...]
    checks: tuple[Check, ...]
    foreign_keys: tuple[ForeignKey, ...]
    deferrable: bool
    arbitrable: bool
    own_parent: bool
    has_triggers: bool
    changes_on_update: bool
    partitioned: bool
    on_update: Mapping[str, Callable[[], str]]

    def column(self, name: str) -> Column:
        return next(column for column in self.columns if column.name == name)

    @cached_property
    def by_key(self) -> Mapping[str, Column]:
        """The columns by how they may stand as a key of an index; expressions are left out."""
        return {quote(one.name): one for one in self.columns} | {
            one.name: one for one in self.columns
        }

    def shared_order(self, columns: Sequence[str]) -> list[str]:
        """The columns of the unique indexes that rows with these columns fill.

        Those of the primary key alone are left out. Rows sorted by them are in an order that all
        who write the same rows share.
        """
        plain = {quote(name): name for name in columns} | {name: name for name in columns}
        keys = [[plain.get(key) for key in index.keys] for index in self.unique_indexes]
        filled = [key for key in keys if None not in key and tuple(key) != self.primary_key]
        return list(dict.fromkeys(name for key in filled for name in key if name is not None))

    @property
    def defaulted(self) -> frozenset[str]:
        """Columns that the database gives a value when a row has none for them."""
        return frozenset(column.name for column in self.columns if column.default is not None)

    def unmet(self, given: set[str]) -> list[str]:
        """Columns that must have a value and get none from the given ones nor from a default."""
        if self.has_triggers:
            return []
        return [
            column.name
            for column in self.columns
            if column.not_null and column.default is None and column.name not in given
        ]


_TABLE = sa.text(
    """
    SELECT EXISTS (SELECT FROM pg_constraint WHERE conrelid = c.oid AND condeferrable)
               AS deferrable,
           NOT EXISTS (SELECT FROM pg_index WHERE indrelid = c.oid AND NOT indimmediate)
               AS arbitrable,
           coalesce(bool_or((t.tgtype & 7) = 7), false) AS has_triggers,
           coalesce(bool_or((t.tgtype & 19) = 19), false) AS changes_on_update,
           c.relkind = 'p' OR c.relhassubclass AS partitioned
      FROM pg_class AS c
      LEFT JOIN pg_trigger AS t
        ON NOT t.tgisinternal
           AND (t.tgrelid = c.oid OR t.tgrelid IN
                (SELECT relid FROM pg_partition_tree(CAST(:table AS regclass))))
     WHERE c.oid = CAST(:table AS regclass)
     GROUP BY c.oid, c.relkind, c.relhassubclass
    """
)
_COLUMNS = sa.text(
    """
    SELECT a.attname AS name, a.attgenerated <> '' AS generated,
           format_type(a.atttypid, a.atttypmod) AS type,
           format_type(base.oid, -1) AS bare_type,
           pg_get_expr(d.adbin, d.adrelid) AS expression,
           CASE WHEN a.attidentity <> ''
                THEN format('nextval(%L::regclass)',
                            pg_get_serial_sequence(CAST(:table AS text), a.attname))
                ELSE pg_get_expr(d.adbin, d.adrelid) END AS "default",
           a.attnotnull AS not_null,
           a.atttypid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype) AS integer,
           pg_get_serial_sequence(CAST(:table AS text), a.attname) IS NOT NULL AS sequence,
           a.attcollation <> 0 AS collated,
           a.atttypid::regtype = ANY(CAST('{bool,int2,int4,int8,text,varchar,uuid,date,'
                                          'timestamp,timestamptz}' AS regtype[]))
           AND coalesce((SELECT collisdeterministic FROM pg_collation WHERE oid = a.attcollation),
                        true) AS comparable,
           CASE WHEN base.typtype = 'e' THEN 'enum'
                WHEN base.typtype = 'b' AND base.typelem = 0
                     AND base.typnamespace <> 'pg_catalog'::regnamespace THEN 'extension'
                ELSE base.typname END AS inner_type
      FROM pg_attribute AS a
      JOIN pg_type AS t ON t.oid = a.atttypid
      JOIN pg_type AS base ON base.oid = coalesce(nullif(t.typbasetype, 0), t.oid)
      LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
     WHERE a.attrelid = CAST(:table AS regclass) AND a.attnum > 0 AND NOT a.attisdropped
     ORDER BY a.attnum
    """
)
_INDEXES = sa.text(
    """
    SELECT c.relname AS name, i.indisprimary AS is_primary, i.indnullsnotdistinct AS nulls_equal,
           ARRAY(SELECT pg_get_indexdef(i.indexrelid, k, true)
                   FROM generate_series(1, i.indnkeyatts) AS k ORDER BY k) AS keys,
           ARRAY(SELECT a.attname::text FROM unnest(i.indkey) WITH ORDINALITY AS k (num, pos)
                   JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.num
                  WHERE k.pos <= i.indnkeyatts ORDER BY k.pos) AS columns,
           pg_get_expr(i.indpred, i.indrelid) AS predicate,
           NOT i.indimmediate AS deferrable
      FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
     WHERE i.indrelid = CAST(:table AS regclass) AND i.indisunique AND i.indisready
     ORDER BY i.indexrelid
    """
)
_CONSTRAINTS = sa.text(
    """
    SELECT con.conname AS name, con.contype AS kind,
           pg_get_expr(con.conbin, con.conrelid) AS expression,
           CASE WHEN con.contype = 'f' THEN con.confrelid::regclass::text END AS parent,
           con.confrelid = con.conrelid AS own_parent,
           ARRAY(SELECT a.attname::text FROM unnest(con.conkey) WITH ORDINALITY AS k (num, pos)
                   JOIN pg_attribute AS a ON a.attrelid = con.conrelid AND a.attnum = k.num
                  ORDER BY k.pos) AS columns,
           ARRAY(SELECT a.attname::text FROM unnest(con.confkey) WITH ORDINALITY AS k (num, pos)
                   JOIN pg_attribute AS a ON a.attrelid = con.confrelid AND a.attnum = k.num
                  ORDER BY k.pos) AS parent_columns
      FROM pg_constraint AS con
     WHERE con.conrelid = CAST(:table AS regclass) AND con.contype IN ('c', 'f')
     ORDER BY con.contype, CASE WHEN con.contype = 'c' THEN con.conname END, con.oid
    """
)


def quote(name: str) -> str:
    """An identifier as SQL."""
    return '"' + name.replace('"', '""') + '"'


def qualified(table: sa.Table) -> str:
    """A table's name as SQL, quoted and qualified where it has to be."""
    # SQLAlchemy leaves this part of its dialects without types
    return postgresql.asyncpg.dialect().identifier_preparer.format_table(table)  # type: ignore[no-untyped-call]  # no types there in SQLAlchemy


async def read_facts(session: AsyncSession, table: sa.Table) -> TableFacts:
    """Read a table's facts from the catalog."""
    name = qualified(table)
    bind = {"table": name}
    whole = (await session.execute(_TABLE, bind)).one()
    columns = (await session.execute(_COLUMNS, bind)).all()
    indexes = (await session.execute(_INDEXES, bind)).all()
    constraints = (await session.execute(_CONSTRAINTS, bind)).all()
    foreign = [one for one in constraints if one.kind in ("f", b"f")]
    return TableFacts(
        name=name,
        table_name=table.name,
        schema_name=table.schema,
        columns=tuple(_column(one) for one in columns if not one.generated),
        generated=tuple(
            GeneratedColumn(one.name, one.type, one.expression) for one in columns if one.generated
        ),
        types={one.name: one.bare_type for one in columns},
        primary_key=next((tuple(one.columns) for one in indexes if one.is_primary), ()),
        unique_indexes=tuple(
            UniqueIndex(one.name, tuple(one.keys), one.predicate, one.nulls_equal, one.deferrable)
            for one in indexes
        ),
        checks=tuple(
            Check(one.name, one.expression, tuple(one.columns))
            for one in constraints
            if one.kind in ("c", b"c")
        ),
        foreign_keys=tuple(
            ForeignKey(one.name, tuple(one.columns), one.parent, tuple(one.parent_columns))
            for one in foreign
        ),
        deferrable=whole.deferrable,
        arbitrable=whole.arbitrable,
        own_parent=any(one.own_parent for one in foreign),
        has_triggers=whole.has_triggers,
        changes_on_update=whole.changes_on_update,
        partitioned=whole.partitioned,
        on_update=on_update(table),
    )


def _column(row: sa.Row[Any]) -> Column:
    return Column(
        row.name,
        row.default,
        row.not_null,
        row.integer,
        row.sequence,
        row.collated,
        row.comparable,
        row.inner_type,
    )
