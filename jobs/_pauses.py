"""When a purge waits: for others that suffer, at the end of its window, or told to stop."""

import asyncio
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

import structlog
from sqlalchemy.ext.asyncio import AsyncSession

from db.due_rows import DueRows
from db.ledger import halt
from db.ledger.halt import Halt
from db.pacing import Strain, read_strain
from jobs._errors import TryLater
from jobs._run import ChunkedRun
from jobs._window import Until

PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 60.0
"""From here on the job gives up its place, and is put off in its queue."""
PUT_OFF: Final = timedelta(seconds=60)
log = structlog.get_logger("bulwark.jobs")


@dataclass(frozen=True)
class Pauses:
    """What a purge has to wait for between two batches."""

    run: ChunkedRun
    began: datetime
    until: Until | None
    most_lag_mib: int | None

    async def wait(self, due: DueRows) -> None:
        """Return when nothing speaks against the next batch.

        Raises TryLater when somebody has stopped the purge, when its window is over, and when it
        would have to wait for long.
        """
        waited_s = 0.0
        while (reason := await self._reason(due)) is not None:
            if waited_s >= LONGEST_PAUSE_S:
                raise TryLater(PUT_OFF, reason)
            if not waited_s:
                log.info("purge.paused", table=due.table_name, reason=reason)
            await self.run.tell_pause(reason)
            await asyncio.sleep(PAUSE_S)  # nothing tells when others are done
            waited_s += PAUSE_S
        if waited_s:
            await self.run.forget_pause()
            log.info("purge.resumed", table=due.table_name, waited_s=waited_s)

    async def _reason(self, due: DueRows) -> str | None:
        async def look(session: AsyncSession) -> tuple[Halt | None, Strain]:
            return (
                await halt.read_halt(session, self.run.claim.kind),
                await read_strain(session, due.oid),
            )

        stopped, strain = await self.run.read(look)
        if stopped is not None:
            raise TryLater(PUT_OFF, str(stopped))
        if self.until and (closed := self.until.closed_for(strain.now, self.began)):
            raise TryLater(closed, f"its window ended at {self.until.at:%H:%M} {self.until.zone}")
        return strain.reason(due.table_name, self.most_lag_mib)
