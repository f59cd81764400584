"""A worker's row from its start to its end, and what it says of the jobs that it knows."""

import os
import socket
from collections.abc import Sequence
from uuid import UUID

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from db import migrations
from db.errors import NotAtHead
from db.ledger import worker
from db.ledger.kind import publish_kinds
from db.transaction import brief, transaction
from jobs._discovery import Jobs
from jobs._kinds import described

log = structlog.get_logger("bulwark.worker")


async def register(
    sessions: async_sessionmaker[AsyncSession], worker_id: UUID, queues: Sequence[str], jobs: Jobs
) -> None:
    """Make the worker's row, and publish how its jobs are declared, for whoever enqueues by SQL."""
    host, pid, kinds = socket.gethostname(), os.getpid(), described(jobs)

    async def introduce(session: AsyncSession) -> None:
        await worker.register(session, worker_id, host, pid, queues, [*jobs])
        await publish_kinds(session, kinds)

    await brief(sessions, introduce, name="worker.register")


async def deregister(sessions: async_sessionmaker[AsyncSession], worker_id: UUID) -> None:
    """Say that the worker has stopped."""
    await transaction(
        sessions,
        lambda session: worker.deregister(session, worker_id),
        name="worker.deregister",
        receipted=True,
    )


async def require_head(engine: AsyncEngine) -> None:
    """Raise NotAtHead unless the database has all migrations of this program; it may have more."""
    async with engine.connect() as connection:
        found = await connection.run_sync(migrations.read_revisions)
    if not found.suffices:
        raise NotAtHead(
            f"the database is at migration {found.current or 'none'}, the program at "
            f"{found.head}; run `bulwark migrate`"
        )
    if found.is_newer:
        log.info("schema.newer", revision=found.current, head=found.head)
