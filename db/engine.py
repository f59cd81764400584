"""The engine: pools by load, time limits, the name PostgreSQL sees, and PgBouncer's rules."""

import asyncio
import json
import math
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import asyncpg
from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, QueuePool

from db.live_rows import LiveSession

RECYCLE_S = 3600
PING_AFTER_S = 10.0
PING_TIMEOUT_S = 5.0
_IDLE_SINCE = "bulwark.idle_since"


class PoolProfile(StrEnum):
    """How much of the server one process may take."""

    LIGHT = "light"
    MEDIUM = "medium"
    HEAVY = "heavy"


class _PoolSize(NamedTuple):
    kept: int
    max_overflow: int


_POOL_SIZES: Mapping[PoolProfile, _PoolSize] = MappingProxyType(
    {
        PoolProfile.LIGHT: _PoolSize(kept=5, max_overflow=5),
        PoolProfile.MEDIUM: _PoolSize(kept=15, max_overflow=10),
        PoolProfile.HEAVY: _PoolSize(kept=25, max_overflow=0),
    }
)


def create_engine(
    url: str,
    *,
    profile: PoolProfile,
    application_name: str,
    connect_timeout_s: float = 10.0,
    pool_timeout_s: float = 30.0,
    command_timeout_s: float | None = None,
    pgbouncer: bool = False,
) -> AsyncEngine:
    """An engine that connects on first use and never shows parameters in its errors.

    A failed connection attempt of any kind is an error with SQLSTATE 08001. With `pgbouncer`
    nothing outlives a transaction on the server, as PgBouncer's transaction mode requires.
    """
    size = _POOL_SIZES[profile]
    settings = {"application_name": application_name}
    connect_args: dict[str, Any] = {
        "async_creator_fn": _connect,
        "timeout": connect_timeout_s,
        "command_timeout": command_timeout_s,
        "server_settings": settings if pgbouncer else settings | _DEAD_CLIENT_SETTINGS,
    }
    engine = create_async_engine(
        url,
        connect_args=connect_args | (_without_named_statements() if pgbouncer else {}),
        pool_size=size.kept,
        max_overflow=size.max_overflow,
        pool_timeout=pool_timeout_s,
        pool_recycle=RECYCLE_S,
        pool_use_lifo=True,  # the connections of a past peak fall idle and can be closed
        hide_parameters=True,
        json_serializer=partial(json.dumps, separators=(",", ":"), ensure_ascii=False),
    )
    _replace_dead_connections(engine)
    return engine


def make_sessions(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    """Sessions whose objects stay readable after the commit without another query.

    They read no deleted rows unless asked: see `db.live_rows`.
    """
    return async_sessionmaker(engine, expire_on_commit=False, sync_session_class=LiveSession)


@dataclass(frozen=True)
class PoolStatus:
    """The connections of one pool at one moment."""

    size: int
    checked_out: int
    overflow: int
    idle: int
    capacity: int


def pool_status(engine: AsyncEngine) -> PoolStatus:
    """What the pool holds; `overflow` counts the connections above `size`."""
    pool = cast("QueuePool", engine.pool)
    return PoolStatus(
        size=pool.size(),
        checked_out=pool.checkedout(),
        overflow=max(0, pool.overflow()),
        idle=pool.checkedin(),
        capacity=pool.size() + pool._max_overflow,  # noqa: SLF001 - has no public name
    )


def _replace_dead_connections(engine: AsyncEngine) -> None:
    """Replace a pooled connection that is dead when it is to be used.

    A server that ended has said so, which costs nothing to see; only a connection that lay idle
    for long is asked, since a router may have forgotten it, and is cut if it does not answer. To
    ask every time, as pool_pre_ping does, takes three round trips.
    """

    @event.listens_for(engine.sync_engine, "checkin")
    def note_time(_: DBAPIConnection | None, record: ConnectionPoolEntry) -> None:
        record.info[_IDLE_SINCE] = time.monotonic()

    @event.listens_for(engine.sync_engine, "checkout")
    def test(connection: Any, record: ConnectionPoolEntry, _: PoolProxiedConnection) -> None:
        if time.monotonic() - record.info.get(_IDLE_SINCE, math.inf) > PING_AFTER_S:
            cut = connection.driver_connection.terminate
            cutting = asyncio.get_running_loop().call_later(PING_TIMEOUT_S, cut)
            try:
                connection.ping()
            except engine.dialect.loaded_dbapi.Error as error:
                raise DisconnectionError from error
            finally:
                cutting.cancel()
        if connection.driver_connection.is_closed():
            raise DisconnectionError


def _without_named_statements() -> dict[str, Any]:
    """Every statement is PostgreSQL's unnamed one, so that no other client can meet its name."""
    return {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": str,
    }


_DEAD_PEER_OPTIONS = {
    "TCP_KEEPIDLE": 15,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 30_000,
}
"""In seconds, but for the last, which is in milliseconds."""
_DEAD_CLIENT_SETTINGS = {
    "tcp_keepalives_idle": "15",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "30000",
}
"""The same for PostgreSQL, lest a session whose client is gone keeps its locks for two hours.

PgBouncer refuses them; its own `tcp_*` settings do this.
"""


async def _connect(**connect_args: Any) -> Any:
    """Connect, and give what the operating system, TLS or the clock says the SQLSTATE it lacks.

    Otherwise a missing socket could not be told from a missing file of the job's own.
    """
    try:
        connection = await asyncpg.connect(**connect_args)
    except (OSError, TimeoutError, asyncpg.ClientConfigurationError) as error:
        reason = str(error) or f"no answer within {connect_args['timeout']} s"
        raise asyncpg.ClientCannotConnectError(
            f"PostgreSQL cannot be reached: {reason}; check that it runs and the database URL"
        ) from error
    _notice_dead_peer(connection)
    return connection


def _notice_dead_peer(connection: Any) -> None:
    """Have the system end a TCP connection whose other side is silent for half a minute.

    Otherwise what waits for an answer, or has sent something, would wait for a quarter of an hour
    and more (tcp(7): tcp_keepalive_time, tcp_retries2).
    """
    peer = connection._transport.get_extra_info("socket")  # noqa: SLF001 - has no public name
    if peer is None or peer.family == socket.AF_UNIX:
        return
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _DEAD_PEER_OPTIONS.items():
        if hasattr(socket, name):  # they are Linux's; others have some of them
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
