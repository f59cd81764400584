"""A TCP wire to Redis that counts round trips, and can be cut off without either end noticing."""

import asyncio
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

_BLOCK_BYTES = 65536


class Wire:
    """Carries connections to a server; those open at a `hush` never carry anything again."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._conversations: set[asyncio.Task[None]] = set()
        self._hushed = asyncio.Event()
        self.round_trips = 0

    def hush(self) -> None:
        """Swallow everything from now on, as a router does that has forgotten its connections."""
        self._hushed.set()

    def mend(self) -> None:
        """Carry new connections again."""
        self._hushed = asyncio.Event()

    def accept(self, client: StreamReader, to_client: StreamWriter) -> None:
        conversation = asyncio.create_task(self._carry(client, to_client, self._hushed))
        self._conversations.add(conversation)
        conversation.add_done_callback(self._conversations.discard)

    async def close(self) -> None:
        for conversation in self._conversations:
            conversation.cancel()
        await asyncio.gather(*self._conversations, return_exceptions=True)

    async def _carry(
        self, client: StreamReader, to_client: StreamWriter, hushed: asyncio.Event
    ) -> None:
        server, to_server = await asyncio.open_connection(*self._address)
        asked = asyncio.Event()

        async def ask() -> None:
            while (block := await client.read(_BLOCK_BYTES)) and not hushed.is_set():
                asked.set()
                to_server.write(block)

        async def answer() -> None:
            while (block := await server.read(_BLOCK_BYTES)) and not hushed.is_set():
                self.round_trips += asked.is_set()
                asked.clear()
                to_client.write(block)

        try:
            ways = [asyncio.create_task(ask()), asyncio.create_task(answer())]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            if hushed.is_set():
                await asyncio.Event().wait()
        finally:
            for way in ways:
                way.cancel()
            to_client.transport.abort()
            to_server.transport.abort()


@asynccontextmanager
async def wired(redis_url: str) -> AsyncIterator[tuple[Wire, str]]:
    """A wire, and the URL that leads through it to the same Redis."""
    url = urlsplit(redis_url)
    wire = Wire(str(url.hostname), url.port or 6379)
    server = await asyncio.start_server(wire.accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield wire, f"redis://127.0.0.1:{port}{url.path}"
    finally:
        server.close()
        await wire.close()
        await server.wait_closed()
