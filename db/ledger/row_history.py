"""What the audit tells of one row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger.audit import Keys, audit

SEARCHED_LINES: Final = 1_000_000
"""The audit has no index by row, which every change would pay for; so only its end is searched."""

_TOLD = (
    audit.c.at,
    audit.c.action,
    audit.c.job_id,
    audit.c.chunk_no,
    audit.c.entry_no,
    audit.c.kind,
    audit.c.actor,
    audit.c.correlation_id,
    audit.c.before,
    audit.c.version,
)


@dataclass(frozen=True)
class RowHistory:
    """Lines of the audit that are about one row, the newest first.

    `complete` tells that there are no others: none beyond the limit, and none so old that they
    were not searched.
    """

    lines: tuple[Mapping[str, Any], ...]
    complete: bool


async def read_row_history(
    session: AsyncSession,
    table: sa.Table,
    key: Sequence[Any],
    *,
    most: int = 100,
    searched_lines: int = SEARCHED_LINES,
) -> RowHistory:
    """The newest lines about the row of this key; sensitive before-values stay inside."""
    oldest = await _job_before(session, searched_lines)
    query = (
        sa.select(*_TOLD)
        .where(audit.c.table_name == table.name, _names(table, key))
        .order_by(audit.c.at.desc(), audit.c.chunk_no.desc(), audit.c.entry_no.desc())
        .limit(most + 1)
    )
    if oldest is not None:
        query = query.where(audit.c.job_id >= oldest)
    found = [dict(row) for row in (await session.execute(query)).mappings()]
    return RowHistory(tuple(found[:most]), oldest is None and len(found) <= most)


async def _job_before(session: AsyncSession, lines: int) -> UUID | None:
    """The job behind whose lines there are so many others; None if there are fewer in all."""
    newest_first = sa.select(audit.c.job_id).order_by(audit.c.job_id.desc())
    return await session.scalar(newest_first.offset(lines).limit(1))


def _names(table: sa.Table, key: Sequence[Any]) -> sa.ColumnElement[bool]:
    """Whether a line is about the row: alone, among the keys of a chunk, or in a range of them.

    Of a million lines nearly all are of one row, so the quickest test stands first.
    """
    spelled = [_as_python_spells(key), _as_sql_spells(table, key)]
    alone = [audit.c["keys"] == _once(_document(one)) for one in spelled]
    among = [_contains(one) for one in spelled]
    if len(key) == 1 and isinstance(key[0], int):
        among.append(_in_range(key[0]))
    return sa.or_(*alone, sa.and_(_not_of_one_key(), sa.or_(*among)))


def _not_of_one_key() -> sa.ColumnElement[bool]:
    """A range may have a single row."""
    return sa.or_(audit.c.rows > 1, audit.c["keys"].has_key("ranges"))


def _as_python_spells(key: Sequence[Any]) -> sa.ColumnElement[Any]:
    """The key as `Keys` writes it."""
    return sa.literal(Keys(keys=[key]).as_json()["keys"][0], JSONB)


def _as_sql_spells(table: sa.Table, key: Sequence[Any]) -> sa.ColumnElement[Any]:
    """The key as statements write it that change rows and audit them."""
    columns = table.primary_key.columns
    given = [sa.literal(value, one.type) for value, one in zip(key, columns, strict=True)]
    return sa.func.jsonb_build_array(*given, type_=JSONB)


def _document(key: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    return sa.func.jsonb_build_object("keys", sa.func.jsonb_build_array(key), type_=JSONB)


def _once(value: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    """Computed once, and not for each line."""
    return sa.select(value).scalar_subquery()


def _contains(key: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    """Containment is quick, but takes (1, 2) and (2, 1) for the same."""
    one = _each("keys")
    within = audit.c["keys"].contains(_once(_document(key)))
    return sa.and_(within, sa.exists().where(one == key))


def _in_range(number: int) -> sa.ColumnElement[bool]:
    one = _each("ranges")
    first, last = (sa.cast(one[at].astext, sa.BigInteger) for at in (0, 1))
    return sa.exists().where(sa.literal(number, sa.BigInteger).between(first, last))


def _each(part: str) -> sa.ColumnElement[Any]:
    """An element of the line's keys or ranges, for a subquery over all of them."""
    elements = sa.func.jsonb_array_elements(audit.c["keys"][part], type_=JSONB)
    return elements.column_valued("one")
