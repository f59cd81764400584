"""Cancelling: it stops at once the jobs of this worker of which that was asked."""

import asyncio

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.ledger.cancellation import cancelled_at_once
from db.retry import DATABASE_ERRORS
from db.transaction import look
from worker.execution import Executor

INTERVAL_S = 0.5


class Canceller:
    """One worker's; it asks PostgreSQL only while jobs run."""

    def __init__(self, sessions: async_sessionmaker[AsyncSession], executor: Executor) -> None:
        self._sessions = sessions
        self._executor = executor

    async def run_forever(self) -> None:
        """Stop jobs until cancelled itself."""
        while True:
            if running := self._executor.running:
                try:
                    claims = await look(self._sessions, lambda s: cancelled_at_once(s, running))
                except DATABASE_ERRORS:
                    claims = []  # the beat says that PostgreSQL is away
                for claim_id in claims:
                    self._executor.cancel(claim_id)
            await asyncio.sleep(INTERVAL_S)  # the one who cancels is no worker, and has no bell
