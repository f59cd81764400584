"""Inserting a chunk by one COPY straight into its table: all rows, or none.

It is the fast way for rows that nothing stands against. What it does is what inserting them one
by one would have done, or it does nothing and `db.bulk` has to find out which row is at fault.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db.batch import Batch
from db.catalog import Column, TableFacts
from db.copy import copy_lines, copy_rows
from db.ledger.audit import Keys
from db.outcome import Inserted
from db.refusal import RowFault, savepoint


def can_copy(facts: TableFacts, columns: Sequence[str]) -> bool:
    """Whether rows with these columns can go straight into the table.

    Not where a trigger may leave rows out or give them other keys, where a row may need one that
    stands before it, and where the rows' keys could not be told afterwards.
    """
    key = integer_key(facts)
    told = key is not None and (key.name in columns or key.sequence)
    return told and not facts.has_triggers and not facts.own_parent


def key_order(facts: TableFacts, columns: Sequence[str]) -> Callable[[Sequence[Any]], Any] | None:
    """What to sort rows by, so that all imports of the same rows insert them in the same order."""
    names = facts.shared_order(columns)
    return itemgetter(*map(columns.index, names)) if names else None


async def draw_keys(
    session: AsyncSession, facts: TableFacts, columns: Sequence[str], count: int
) -> list[int] | None:
    """So many keys from the table's sequence, for nobody else; None where the rows bring theirs.

    A sequence does not roll back: keys may be drawn in one transaction and used in another.
    """
    key = integer_key(facts)
    if key is None or key.name in columns or not count:
        return None
    default = str(key.default).replace(":", r"\:")  # its sequence may have any name
    drawn = sa.text(f"SELECT array_agg({default}) FROM generate_series(1, :count)")
    keys: list[int] = await session.scalar(drawn, {"count": count})
    return keys


async def insert_directly(
    session: AsyncSession,
    facts: TableFacts,
    columns: Sequence[str],
    batch: Batch,
    drawn: Sequence[int] | None = None,
) -> Inserted | None:
    """Insert all rows in the session's transaction; None, with nothing done, if one is refused.

    Without keys that were drawn for them it draws some. The rows get them in input order and go in
    sorted, so that two imports of the same rows in different orders do not wait for each other in
    a circle.
    """
    key = integer_key(facts)
    assert key is not None
    if not batch.records:
        return Inserted(Keys(ranges=[]))
    drawn = drawn or await draw_keys(session, facts, columns, len(batch))
    keys = drawn or _given(batch, columns, key)
    if facts.deferrable:
        await session.execute(sa.text("SET CONSTRAINTS ALL IMMEDIATE"))
    try:
        async with savepoint(session):
            await _copy(session, facts, columns, batch, (key.name, drawn) if drawn else None)
    except RowFault:
        return None
    return Inserted(Keys(ranges=list(_ranges(sorted(keys)))), frozenset(range(len(batch))))


async def _copy(
    session: AsyncSession,
    facts: TableFacts,
    columns: Sequence[str],
    batch: Batch,
    reserved: tuple[str, Sequence[int]] | None,
) -> None:
    table, schema = facts.table_name, facts.schema_name
    names = (*columns,) if reserved is None else (reserved[0], *columns)
    keys = None if reserved is None else reserved[1]
    if batch.lines is None:
        records = batch.records
        rows = (records[at] if keys is None else (keys[at], *records[at]) for at in batch.order)
        await copy_rows(session, table, schema, names, rows)
    else:
        await copy_lines(session, table, schema, names, _lines(batch, keys))


def _lines(batch: Batch, keys: Sequence[int] | None) -> Iterable[str]:
    """The rows in order, each with its key in front, if it is to have one."""
    if keys is batch.keys:
        assert batch.lines is not None
        return map(batch.lines.__getitem__, batch.order)
    if keys is None:
        return (batch.line(at) for at in batch.order)
    return (f"{keys[at]}\t{batch.line(at)}" for at in batch.order)


def integer_key(facts: TableFacts) -> Column | None:
    """The primary key, where it is one column of integers."""
    if len(facts.primary_key) != 1:
        return None
    key = facts.column(facts.primary_key[0])
    return key if key.integer else None


def _given(batch: Batch, columns: Sequence[str], key: Column) -> list[Any]:
    at = columns.index(key.name)
    return [record[at] for record in batch.records]


def _ranges(keys: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending keys as runs without a gap."""
    if keys[-1] - keys[0] == len(keys) - 1:
        yield keys[0], keys[-1]
        return
    for _, run in groupby(enumerate(keys), lambda pair: pair[1] - pair[0]):
        numbers = [key for _, key in run]
        yield numbers[0], numbers[-1]
