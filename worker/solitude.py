"""Many jobs of one worker at a time, or one alone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

SOLITUDE_WAIT_S = 5.0
"""How long one suspect may keep other jobs of its worker from starting, before it runs itself."""


class Solitude:
    """Lets many jobs run at once, or one alone, which keeps others from starting."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._running = 0
        self._alone = False

    @asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._alone)
            self._running += 1
        try:
            yield
        finally:
            async with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[bool]:
        """Tell whether one is alone now, once those that run have ended; no other starts.

        The answer is no when they take longer than SOLITUDE_WAIT_S, and at once when somebody
        else is alone or waits for it.
        """
        if self._alone:
            yield False
            return
        self._alone = True
        try:
            yield await self._others_end()
        finally:
            async with self._changed:
                self._alone = False
                self._changed.notify_all()

    async def _others_end(self) -> bool:
        try:
            async with asyncio.timeout(SOLITUDE_WAIT_S), self._changed:
                await self._changed.wait_for(lambda: self._running == 0)
        except TimeoutError:
            return False
        return True
