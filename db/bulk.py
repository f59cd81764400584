"""Inserting one chunk of rows as sets, with the verdict that each row would have got on its own."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncSession

from db.batch import Batch
from db.catalog import TableFacts
from db.outcome import Inserted
from db.staged_insert import StagedInsert
from db.staging import OnConflict


async def insert_rows(
    session: AsyncSession,
    facts: TableFacts,
    columns: Sequence[str],
    batch: Batch,
    on_conflict: OnConflict,
) -> Inserted:
    """Insert rows in the session's transaction and say which were not, and why.

    A value may be DEFAULT where the column has one, or is null without a value.
    A clash with a unique index is a refusal, or with on_conflict "skip" no more than a skip; so
    is a row that a trigger leaves out. Raises Miscounted, and what is not about single rows: lost
    connections, contention, missing privileges.
    """
    stage = StagedInsert(session, facts, tuple(columns), on_conflict)
    await stage.create()
    await stage.load_all(batch)
    stage.sort_if_independent()
    if facts.own_parent:
        await stage.insert_one_by_one()
    elif not await stage.insert_at_once():
        if not facts.has_triggers:  # what a trigger will make of a row cannot be told beforehand
            await stage.classify()
        await stage.insert_halving(0, len(batch))
    await stage.explain_leftovers()
    return (await stage.outcome()).accounting_for(len(batch))


def bind_processors(table: sa.Table, columns: Sequence[str]) -> list[Callable[[Any], Any] | None]:
    """What turns Python values into what COPY takes, by column; None where nothing has to."""
    dialect = _dialect()
    return [table.c[name].type.dialect_impl(dialect).bind_processor(dialect) for name in columns]


@cache
def _dialect() -> sa.Dialect:
    # SQLAlchemy leaves the constructors of its dialects without types
    return postgresql.asyncpg.dialect()  # type: ignore[no-untyped-call]  # no types there in SQLAlchemy
