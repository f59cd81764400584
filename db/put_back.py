"""Rows that were removed, put back as they were: with their keys, from values as text."""

from collections.abc import Mapping, Sequence

from sqlalchemy.ext.asyncio import AsyncSession

from db.batch import batch_of_texts
from db.bulk import insert_rows
from db.catalog import TableFacts, quote
from db.exact_text import use_exact_text
from db.ledger.audit import Keys
from db.outcome import Inserted


async def put_back(
    session: AsyncSession, facts: TableFacts, texts: Mapping[str, Sequence[str | None]]
) -> Inserted:
    """Insert rows that are given by column; those whose key is there are skipped.

    What the database computes itself is left to it.
    """
    await use_exact_text(session)
    keys = [texts[name] for name in facts.primary_key]
    skipped = await _there(session, facts, keys)
    absent = [at for at in range(len(keys[0])) if at not in skipped]
    if not absent:
        return Inserted(Keys(ranges=[]), skipped=frozenset(skipped))
    columns = [one.name for one in facts.columns if one.name in texts]
    batch = batch_of_texts([[texts[name][at] for at in absent] for name in columns])
    done = await insert_rows(session, facts, columns, batch, "reject")
    return Inserted(
        done.keys,
        frozenset(absent[at] for at in done.inserted),
        frozenset(skipped),
        {absent[at]: why for at, why in done.refused.items()},
    ).accounting_for(len(keys[0]))


async def _there(
    session: AsyncSession, facts: TableFacts, keys: Sequence[Sequence[str | None]]
) -> set[int]:
    """The positions of the keys that the table has."""
    places = range(len(keys))
    given = ", ".join(f"CAST(${at + 1} AS text[])" for at in places)
    same = " AND ".join(
        f"t.{quote(name)} = CAST(g.k{at} AS {facts.types[name]})"
        for at, name in enumerate(facts.primary_key)
    )
    sql = (
        f"SELECT array_agg(g.position - 1) FROM unnest({given}) "
        f"WITH ORDINALITY AS g ({', '.join(f'k{at}' for at in places)}, position) "
        f"WHERE EXISTS (SELECT FROM {facts.name} AS t WHERE {same})"
    )
    connection = await session.connection()
    found = await connection.exec_driver_sql(sql, tuple(list(one) for one in keys))
    return set(found.scalar() or ())
