"""Removing rows for good, a batch at a time, each only once nothing refers to it any more.

A batch looks at the next rows that are due, in their order, so that none is looked at by two
batches of one pass. Of those it removes what nothing refers to and nobody has locked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from db.catalog import quote
from db.due_rows import DueRows
from db.errors import Race
from db.exact_text import use_exact_text
from db.ledger.audit import Keys
from db.retry import sqlstate

_FOREIGN_KEY_VIOLATION = "23503"


@dataclass(frozen=True)
class Removed:
    """What a batch did: how many rows it looked at, the place of the last, and what is gone.

    `texts` are the columns that were asked for, with the values of each removed row as text.
    """

    examined: int
    last: list[str] | None
    rows: int
    keys: Keys
    texts: dict[str, list[str | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """A row that is due and is still there, and the row that refers to it, if that is why."""

    key: str
    referrer: str | None
    by: str | None


async def remove_batch(
    session: AsyncSession,
    due: DueRows,
    behind: Sequence[str] | None,
    rows: int,
    columns: Sequence[str] = (),
) -> Removed:
    """Remove what can go of so many rows behind a place in the order, or from the first on.

    Raises Race when a row was referred to in the meantime.
    """
    await use_exact_text(session)
    given: list[Any] = [due.cutoff, rows, *(behind or ())]
    free = ""
    if any(one.acts for one in due.referrers):
        given.append(await _locked(session, due, given))
        free = f" AND {_identity('f')} = ANY(CAST(${len(given)} AS text[]))"
    sql = _removal(due, columns, free, placed=behind is not None)
    try:
        found = (await _run(session, sql, *given)).one()
        await _run(session, "SET CONSTRAINTS ALL IMMEDIATE")
    except IntegrityError as error:
        if sqlstate(error) == _FOREIGN_KEY_VIOLATION:
            raise Race(f"a row of {due.table} is referred to by now") from error
        raise
    examined, last, count, *arrays = found
    keys, texts = arrays[: len(due.key)], arrays[len(due.key) :]
    return Removed(
        examined,
        last,
        count,
        _as_keys(due, [one or [] for one in keys]),
        {name: one or [] for name, one in zip(columns, texts, strict=True)},
    )


async def explain_kept(
    session: AsyncSession, due: DueRows, behind: Sequence[str] | None, last: Sequence[str]
) -> list[Kept]:
    """Why the rows behind one place, to another, are still there; what is gone is left out."""
    given = [due.cutoff, *last, *(behind or ())]
    size = len(due.order)
    within = f"({due.ordered('f')}) <= ({due.parameters(2)})"
    if behind is not None:
        within += f" AND ({due.ordered('f')}) > ({due.parameters(2 + size)})"
    key = _as_text("f", due.key)
    sql = (
        f"SELECT {key}, why.referrer, why.by FROM {due.table} AS f "
        f"LEFT JOIN LATERAL ({_why(due)}) AS why ON true "
        f"WHERE {due.where('f')} AND {within} ORDER BY {due.ordered('f')}"
    )
    return [Kept(*row) for row in await _run(session, sql, *given)]


async def _run(session: AsyncSession, sql: str, *given: Any) -> Any:
    """Run SQL as PostgreSQL takes it: expressions of tables may hold colons and percent signs."""
    return await (await session.connection()).exec_driver_sql(sql, given)


def _examined(due: DueRows, *, placed: bool) -> str:
    """The next rows in order: $2 of them, behind the place that $3 and those after it say."""
    behind = f" AND ({due.ordered('p')}) > ({due.parameters(3)})" if placed else ""
    place = ", ".join(f"p.{quote(name)} AS o{at}" for at, name in enumerate(due.order))
    return (
        f"SELECT p.ctid AS place, {place} FROM {due.table} AS p "
        f"WHERE {due.where('p')}{behind} ORDER BY {due.ordered('p')} LIMIT $2"
    )


def _removal(due: DueRows, columns: Sequence[str], free: str, *, placed: bool) -> str:
    returned = [
        *(f"{_key_cell(due, name)} AS k{at}" for at, name in enumerate(due.key)),
        *(f"CAST(r.{quote(name)} AS text) AS c{at}" for at, name in enumerate(columns)),
    ]
    arrays = [
        *(f"array_agg(k{at})" for at in range(len(due.key))),
        *(f"array_agg(c{at})" for at in range(len(columns))),
    ]
    order = ", ".join(f"o{at} DESC" for at in range(len(due.order)))
    last = ", ".join(f"CAST(o{at} AS text)" for at in range(len(due.order)))
    return (
        f"WITH examined AS MATERIALIZED ({_examined(due, placed=placed)}), "
        f"removed AS (DELETE FROM {due.table} AS r WHERE {_chosen(due, free)} "
        f"RETURNING {', '.join(returned)}) "
        f"SELECT (SELECT count(*) FROM examined), "
        f"(SELECT ARRAY[{last}] FROM examined ORDER BY {order} LIMIT 1), "
        f"count(*), {', '.join(arrays)} FROM removed"
    )


def _chosen(due: DueRows, free: str) -> str:
    """That a row is examined, free, and referred to by none.

    OFFSET 0 keeps each look for referring rows to itself: by its index, for the rows of the batch.
    """
    unreferred = "".join(
        f" AND NOT EXISTS (SELECT FROM {one.table} AS c WHERE {one.joined('c', 'f')} OFFSET 0)"
        for one in due.referrers
    )
    rest = f"{due.where('f')}{unreferred}{free} FOR UPDATE OF f SKIP LOCKED"
    if not due.facts.partitioned:
        return (
            f"r.ctid = ANY(ARRAY(SELECT f.ctid FROM {due.table} AS f "
            f"WHERE f.ctid = ANY(ARRAY(SELECT place FROM examined)) AND {rest}))"
        )
    columns = [due.order.index(name) for name in due.key]
    key = ", ".join(f"{{row}}.{quote(name)}" for name in due.key)
    examined = ", ".join(f"o{at}" for at in columns)
    return (
        f"({key.format(row='r')}) IN (SELECT {key.format(row='f')} FROM {due.table} AS f "
        f"WHERE ({key.format(row='f')}) IN (SELECT {examined} FROM examined) AND {rest})"
    )


async def _locked(session: AsyncSession, due: DueRows, given: Sequence[Any]) -> list[str]:
    """Lock the rows before anybody looks what refers to them; which they are.

    Where a foreign key deletes along, a row that came to refer to one unseen would go with it.
    """
    sql = (
        f"WITH examined AS MATERIALIZED ({_examined(due, placed=len(given) > 2)}) "
        f"SELECT array_agg(id) FROM (SELECT {_identity('f')} AS id FROM {due.table} AS f "
        f"WHERE f.ctid IN (SELECT place FROM examined) AND {due.where('f')} "
        f"FOR UPDATE OF f SKIP LOCKED) AS locked"
    )
    return (await _run(session, sql, *given)).scalar() or []


def _identity(row: str) -> str:
    return f"(CAST({row}.tableoid AS text) || CAST({row}.ctid AS text))"


def _why(due: DueRows) -> str:
    """One row that refers to the row `f`, and by which key."""
    looks = [
        f"(SELECT {_literal(one.name)} AS referrer, {_as_text('c', one.key)} AS by "
        f"FROM {one.table} AS c WHERE {one.joined('c', 'f')} LIMIT 1)"
        for one in due.referrers
    ]
    nothing = "(SELECT CAST(NULL AS text) AS referrer, CAST(NULL AS text) AS by WHERE false)"
    return f"SELECT * FROM ({' UNION ALL '.join([*looks, nothing])}) AS found LIMIT 1"


def _key_cell(due: DueRows, name: str) -> str:
    cell = f"r.{quote(name)}"
    return cell if due.facts.column(name).integer else f"CAST({cell} AS text)"


def _as_text(row: str, key: Sequence[str]) -> str:
    cells = [f"CAST({row}.{quote(name)} AS text)" for name in key]
    return f"concat_ws(', ', {', '.join(cells)})" if cells else "CAST(NULL AS text)"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _as_keys(due: DueRows, columns: Sequence[Sequence[Any]]) -> Keys:
    """The keys of the removed rows: ranges without a gap, where that is shorter than a list."""
    if len(due.key) == 1 and due.facts.column(due.key[0]).integer:
        ranges = _ranges(sorted(columns[0]))
        if 2 * len(ranges) <= len(columns[0]):
            return Keys(ranges=ranges)
    return Keys(keys=list(zip(*columns, strict=True)))


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges
