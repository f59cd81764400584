"""How long a transaction of a job, or of the ledger itself, may take and wait."""

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession


@dataclass(frozen=True)
class Limits:
    """How long a transaction may take: a statement, idle between statements, waiting for a lock."""

    statement_s: float
    idle_s: float
    lock_s: float = 10.0

    @property
    def parameters(self) -> dict[str, str]:
        """What SET_LIMITS takes."""
        return {
            "statement_ms": str(round(self.statement_s * 1000)),
            "idle_ms": str(round(self.idle_s * 1000)),
            "lock_ms": str(round(self.lock_s * 1000)),
        }


BRIEF = Limits(statement_s=30.0, idle_s=10.0, lock_s=2.0)

SET_LIMITS = """
        SELECT set_config('statement_timeout', :statement_ms, true),
               set_config('idle_in_transaction_session_timeout', :idle_ms, true),
               set_config('lock_timeout', :lock_ms, true)
"""
_LIMIT = sa.text(SET_LIMITS)


async def limit(session: AsyncSession, limits: Limits) -> None:
    """Bound a transaction of the ledger's own, so that it holds no row for long."""
    await session.execute(_LIMIT, limits.parameters)
