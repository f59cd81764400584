"""Having all connections that PostgreSQL gives, and asking again until it takes something."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import asyncpg

from db.retry import DATABASE_ERRORS, Fault, classify
from tests.stage import connected

_OURS = """
    FROM pg_stat_activity
   WHERE starts_with(application_name, 'bulwark ') OR application_name = 'producer'
"""


async def accepted_at_last(accept: Callable[[], Awaitable[object]]) -> bool:
    """Whether PostgreSQL has taken it; while it is away it may not."""
    try:
        await accept()
    except DATABASE_ERRORS as error:
        if classify(error) is Fault.OUTAGE:
            return False
        raise
    return True


@asynccontextmanager
async def all_connections_taken(url: str) -> AsyncIterator[None]:
    """Leave none to workers and the producer `producer` while the block lasts; not even theirs."""
    async with AsyncExitStack() as stack:
        eye = await stack.enter_async_context(connected(url))
        left = True
        while left:
            await eye.execute(f"SELECT pg_terminate_backend(pid) {_OURS}")
            try:
                await stack.enter_async_context(connected(url))
            except asyncpg.TooManyConnectionsError:
                left = bool(await eye.fetchval(f"SELECT count(*) {_OURS}"))
        yield
