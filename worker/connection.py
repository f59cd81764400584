"""The connections of the command line to PostgreSQL and Redis, each for the time of one command."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from db.engine import PoolProfile, create_engine, make_sessions
from jobs._bell import Bell
from jobs._discovery import discover_jobs
from jobs._producer import Producer
from worker.redis_pool import make_redis
from worker.registration import require_head
from worker.settings import Settings

CONNECT_TIMEOUT_S = 10.0

Sessions = async_sessionmaker[AsyncSession]


@asynccontextmanager
async def open_engine(
    settings: Settings, *, command_timeout_s: float | None = None
) -> AsyncIterator[AsyncEngine]:
    """An engine of few connections, none of which is opened yet."""
    engine = create_engine(
        settings.require_database(),
        profile=PoolProfile.LIGHT,
        application_name="bulwark command line",
        connect_timeout_s=CONNECT_TIMEOUT_S,
        command_timeout_s=command_timeout_s,
        pgbouncer=settings.pgbouncer,
    )
    try:
        yield engine
    finally:
        await engine.dispose()


@asynccontextmanager
async def open_ledger(settings: Settings) -> AsyncIterator[Sessions]:
    """Sessions on a database that has all migrations of this program. Raises NotAtHead."""
    async with open_engine(settings) as engine:
        await require_head(engine)
        yield make_sessions(engine)


@asynccontextmanager
async def open_producer(settings: Settings, sessions: Sessions) -> AsyncIterator[Producer]:
    """A producer that rings Redis if it answers; otherwise a worker's relay will."""
    async with _open_bell(settings) as bell:
        yield Producer(
            sessions,
            discover_jobs(settings.job_modules),
            bell,
            idempotency_retention=timedelta(days=settings.idempotency_retention_days),
        )


@asynccontextmanager
async def _open_bell(settings: Settings) -> AsyncIterator[Bell | None]:
    if settings.redis_url is None:
        yield None
        return
    async with make_redis(settings.redis_url.get_secret_value(), settings.redis_timeout_s) as redis:
        try:
            await redis.ping()
        except RedisError:
            yield None
        else:
            yield Bell(redis)
