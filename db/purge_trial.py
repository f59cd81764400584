"""Counting what a purge would remove, without removing it: for all tables together."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncSession

from db.catalog import quote
from db.due_rows import DueRows, Referrer, goes_round
from db.exact_text import use_exact_text


@dataclass
class Counted:
    """What would become of the rows of a table that are due; `kept` only where all are judged."""

    due: int
    purged: int = 0
    kept: int | None = None


@dataclass(frozen=True)
class Trial:
    """The result by the name of the table, and whether the cap ended it."""

    tables: dict[str, Counted]
    capped: bool


async def take_snapshot(session: AsyncSession) -> None:
    """Let everything be judged by one snapshot: to be the first thing in a transaction."""
    await _run(session, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")


async def count_removable(
    session: AsyncSession, groups: Sequence[Sequence[DueRows]], most: int | None
) -> Trial:
    """What a purge would remove that began now, of all tables in the order in which it does.

    Writes temporary tables alone. A row goes if only rows refer to it that go as well, beginning
    with those that nothing refers to; so a circle of rows stays.
    """
    await use_exact_text(session)
    every = [due for group in groups for due in group]
    staged = {due.oid: f"pg_temp.bulwark_due_{number}" for number, due in enumerate(every)}
    keys = {due.oid: due.key for due in every}
    counted = {due.table_name: Counted(await _stage(session, due, staged)) for due in every}
    left = most
    for group in groups:
        while True:
            gone = 0
            for due in group:
                found = await _run(session, _mark(due, staged, keys))
                going = found if left is None else min(left, found)
                counted[due.table_name].purged += going
                left = None if left is None else left - going
                gone += going
            if left == 0:
                return Trial(counted, capped=True)
            if not gone or not goes_round(group):
                break
    for one in counted.values():
        one.kept = one.due - one.purged
    return Trial(counted, capped=False)


async def _run(session: AsyncSession, sql: str, *given: str) -> int:
    """Run SQL as PostgreSQL takes it. Returns how many rows it touched."""
    return (await (await session.connection()).exec_driver_sql(sql, given)).rowcount


async def _stage(session: AsyncSession, due: DueRows, staged: dict[int, str]) -> int:
    """Put down the rows that are due. Returns how many there are."""
    targets = (name for one in due.referrers for name in one.targets)
    columns = ", ".join(f"p.{quote(name)}" for name in dict.fromkeys([*due.key, *targets]))
    stage = staged[due.oid]
    await _run(
        session,
        f"CREATE TEMPORARY TABLE {stage.removeprefix('pg_temp.')} ON COMMIT DROP AS "
        f"SELECT {columns}, false AS bulwark_gone FROM {due.table} AS p WITH NO DATA",
    )
    count = await _run(
        session,
        f"INSERT INTO {stage} SELECT {columns}, false FROM {due.table} AS p WHERE {due.where('p')}",
        due.cutoff,
    )
    await _run(session, f"ANALYZE {stage}")
    return count


def _mark(due: DueRows, staged: dict[int, str], keys: dict[int, tuple[str, ...]]) -> str:
    """Mark the rows that no row refers to but those that are marked already."""
    unreferred = "".join(
        f" AND NOT EXISTS (SELECT FROM {one.table} AS c WHERE {one.joined('c', 'd')}"
        f"{_stays(one, staged, keys)})"
        for one in due.referrers
    )
    return (
        f"UPDATE {staged[due.oid]} AS d SET bulwark_gone = true "
        f"WHERE NOT d.bulwark_gone{unreferred}"
    )


def _stays(one: Referrer, staged: dict[int, str], keys: dict[int, tuple[str, ...]]) -> str:
    if one.oid not in staged:
        return ""
    same = " AND ".join(f"g.{quote(name)} = c.{quote(name)}" for name in keys[one.oid])
    return f" AND NOT EXISTS (SELECT FROM {staged[one.oid]} AS g WHERE g.bulwark_gone AND {same})"
