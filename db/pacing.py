"""What others suffer from, or wait for: whether long work on a table had better pause."""

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

_MIB = 1024 * 1024


@dataclass(frozen=True)
class Strain:
    """What a table and the server have to bear at this moment, by PostgreSQL's clock.

    A role that may not see what others do (pg_monitor may) sees no replicas and no vacuum.
    """

    now: datetime
    lag_mib: float
    waiting: int
    vacuuming: bool

    def reason(self, table: str, most_lag_mib: int | None) -> str | None:
        """Why to pause, if there is a reason to."""
        if most_lag_mib is not None and self.lag_mib > most_lag_mib:
            return f"a replica is {self.lag_mib:,.0f} MiB behind, more than {most_lag_mib:,} MiB"
        if self.waiting:
            return f"{self.waiting} others wait for locks on {table}"
        if self.vacuuming:
            return f"{table} is being vacuumed"
        return None


_STRAIN = sa.text(
    """
    SELECT clock_timestamp() AS now,
           coalesce((SELECT max(pg_wal_lsn_diff(pg_current_wal_lsn(), replay_lsn))
                       FROM pg_stat_replication), 0)::float8 AS lag_bytes,
           (SELECT count(DISTINCT pid) FROM pg_locks
             WHERE relation = :oid AND pid <> pg_backend_pid()
               AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
               AND (NOT granted OR locktype = 'tuple')) AS waiting,
           EXISTS (SELECT FROM pg_stat_progress_vacuum
                    WHERE datname = current_database()
                      AND (relid = :oid
                           OR relid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = :oid)))
               AS vacuuming
    """
).bindparams(sa.bindparam("oid", type_=sa.BigInteger))


async def read_strain(session: AsyncSession, oid: int) -> Strain:
    """Look at the replicas, at who waits for a lock on the table or a row, and at the vacuum."""
    row = (await session.execute(_STRAIN, {"oid": oid})).one()
    return Strain(row.now, row.lag_bytes / _MIB, row.waiting, row.vacuuming)
