"""Hearing at once of jobs that SQL has enqueued: PostgreSQL notifies, a relay is woken."""

import asyncio
from collections.abc import Callable
from typing import NoReturn

import asyncpg
import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from db.ledger.kind import CHANNEL
from db.retry import DATABASE_ERRORS, describe
from worker.outage import Outage

PROBE_INTERVAL_S = 15.0
PROBE_TIMEOUT_S = 5.0
"""How long an answer may take before the connection is given up: one may die in silence."""
log = structlog.get_logger("bulwark.listen")


class ConnectionEnded(ConnectionError):
    """PostgreSQL ended the connection."""


class Listener:
    """Listens on a connection of its own; while there is none, relays look at their intervals.

    `wake` is also called whenever listening begins, for what came while nobody listened.
    """

    def __init__(self, engine: AsyncEngine, wake: Callable[[], None]) -> None:
        self._engine = engine
        self._wake = wake
        self._outage = Outage(log, "listen.failed", "listen.back", server="postgresql")

    async def run_forever(self) -> None:
        """Listen until cancelled; a lost connection is replaced."""
        try:
            while True:
                try:
                    await self._listen()
                except (TimeoutError, *DATABASE_ERRORS) as error:
                    wait_s = self._outage.fail(describe(error), remedy="relays poll meanwhile")
                await asyncio.sleep(wait_s)  # nothing tells that PostgreSQL is back
        finally:
            await self._engine.dispose()

    async def _listen(self) -> NoReturn:
        """Listen until the connection is lost, which raises."""
        async with self._engine.connect() as pooled:
            connection = (await pooled.get_raw_connection()).driver_connection
            assert isinstance(connection, asyncpg.Connection)
            ended = asyncio.Event()
            connection.add_termination_listener(lambda _: ended.set())
            try:
                await connection.add_listener(CHANNEL, lambda *_: self._wake())
                self._outage.end()
                self._wake()
                await _until_ended(connection, ended)
            finally:
                connection.terminate()


async def _until_ended(connection: asyncpg.Connection, ended: asyncio.Event) -> NoReturn:
    while True:
        try:
            async with asyncio.timeout(PROBE_INTERVAL_S):
                await ended.wait()
        except TimeoutError:
            await connection.execute("SELECT 1", timeout=PROBE_TIMEOUT_S)
        else:
            raise ConnectionEnded("the connection has ended")
