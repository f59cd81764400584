"""Having all connections that PostgreSQL gives, and asking again until it takes something."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import asyncpg

from db.retry import DATABASE_ERRORS, Fault, classify
from tests.stage import connected

_OURS = "(starts_with(application_name, 'bulwark ') OR application_name = 'producer')"
# A session that still starts has not said yet whose it is, so that it counts as no one's.
_TAKEN = f"""
    SELECT count(*) = current_setting('max_connections')::integer
      FROM pg_stat_activity
     WHERE backend_type = 'client backend'
       AND state IN ('active', 'idle', 'idle in transaction')
       AND NOT {_OURS}
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
        while not await eye.fetchval(_TAKEN):
            await eye.execute(
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {_OURS}"
            )
            with suppress(asyncpg.TooManyConnectionsError):
                await stack.enter_async_context(connected(url))
        yield
