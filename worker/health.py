"""Whether everything that jobs need is there: the database, Redis, and workers that serve."""

import socket
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncEngine

from db.engine import PoolStatus, pool_status
from db.migrations import read_revisions
from db.retry import DATABASE_ERRORS
from worker.connection import open_engine
from worker.exit_codes import unreachable_postgres, unreachable_redis
from worker.redis_pool import make_redis, may_evict
from worker.settings import Settings

ANSWER_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Queues:
    """The work that waits, and who could do it."""

    live_workers: int
    live_workers_here: int
    queued: int
    running: int
    oldest_queued_s: float | None
    unserved: list[str]


@dataclass(frozen=True)
class Health:
    """What was found; healthy when there are no faults. None stands for what cannot be told."""

    faults: tuple[str, ...]
    revision: str | None = None
    head: str | None = None
    queues: Queues | None = None
    pool: PoolStatus | None = None

    @property
    def healthy(self) -> bool:
        return not self.faults

    def as_json(self) -> dict[str, Any]:
        """The document that `--json` promises."""
        return {"healthy": self.healthy, **asdict(self)}


async def check_health(settings: Settings, *, here: bool = False) -> Health:
    """Look at both servers and at the queues; what is wrong is a fault and no error.

    With `here` a worker of this host must be alive; those of others do not make up for it.

    Raises SettingsError when it is not said where the servers are.
    """
    servers = settings.require_servers()
    redis_faults = await _redis_faults(servers.redis_url, settings.redis_timeout_s)
    try:
        async with open_engine(settings, command_timeout_s=ANSWER_TIMEOUT_S) as engine:
            found = await _look_into(engine, settings.lost_after_s, here=here)
    except DATABASE_ERRORS as error:
        found = Health((unreachable_postgres(error),))
    return Health(**{**vars(found), "faults": (*found.faults, *redis_faults)})


async def _redis_faults(url: str, timeout_s: float) -> list[str]:
    async with make_redis(url, timeout_s) as redis:
        try:
            evicts = await may_evict(redis)
        except RedisError as error:
            return [unreachable_redis(error)]
    remedy = "set its maxmemory-policy to noeviction"
    return [f"Redis may throw signals away when its memory is full: {remedy}"] if evicts else []


async def _look_into(engine: AsyncEngine, lost_after_s: float, *, here: bool) -> Health:
    async with engine.connect() as connection:
        found = await connection.run_sync(read_revisions)
        revision, head = found.current, found.head
        pool = pool_status(engine)
        if not found.suffices:
            fault = (
                f"The database is at migration {revision or 'none'}, the program at {head}: "
                "run `bulwark migrate`"
            )
            return Health((fault,), revision, head, pool=pool)
        given = {"lost_after_s": lost_after_s, "host": socket.gethostname()}
        row = (await connection.execute(_QUEUES, given)).mappings().one()
    queues = Queues(**row)
    return Health(tuple(_queue_faults(queues, here=here)), revision, head, queues, pool)


def _queue_faults(queues: Queues, *, here: bool) -> list[str]:
    if here and not queues.live_workers_here:
        host = socket.gethostname()
        return [f"No worker of this host, {host}, is alive: start one with `bulwark worker`"]
    if not queues.live_workers:
        return ["No worker is alive: start one with `bulwark worker`"]
    return [
        f"Jobs wait in the queue {name}, which no worker serves: name it in BULWARK_QUEUES"
        for name in queues.unserved
    ]


_QUEUES = sa.text(
    """
    WITH alive AS (
        SELECT host, queues FROM bulwark.worker
         WHERE ended_at IS NULL AND seen_at > now() - make_interval(secs => :lost_after_s)
    ), waiting AS (
        SELECT queue, greatest(queued_at, run_at) AS since
          FROM bulwark.job WHERE state = 'queued' AND run_at <= now()
    )
    SELECT (SELECT count(*) FROM alive) AS live_workers,
           (SELECT count(*) FROM alive WHERE host = :host) AS live_workers_here,
           (SELECT count(*) FROM bulwark.job WHERE state = 'queued') AS queued,
           (SELECT count(*) FROM bulwark.job WHERE state = 'running') AS running,
           (SELECT extract(epoch FROM now() - min(since))::float8 FROM waiting) AS oldest_queued_s,
           ARRAY(SELECT DISTINCT queue FROM waiting
                  WHERE NOT EXISTS (SELECT FROM alive WHERE waiting.queue = ANY (alive.queues))
                  ORDER BY queue) AS unserved
    """
)
