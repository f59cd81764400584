"""TCP wires, which count round trips, and can go dead unnoticed by either end."""

import asyncio
import socket
from abc import ABC, abstractmethod
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from urllib.parse import urlsplit

_BLOCK_BYTES = 65536
Connect = Callable[[], Awaitable[tuple[StreamReader, StreamWriter]]]


class Carrier(ABC):
    """Accepts connections and carries each until either side ends it.

    It accepts by itself: a server of asyncio does not say when the last connection that it was
    accepting at its end has come, and would leave that open.
    """

    def __init__(self) -> None:
        self._conversations: set[asyncio.Task[None]] = set()

    async def open(self, port: int = 0) -> int:
        """Accept connections at this port of loopback, or at the one that is given back."""
        self._closed = False
        self._socket = socket.create_server(("127.0.0.1", port))
        self._socket.setblocking(False)
        self._accepting = asyncio.create_task(self._accept())
        return int(self._socket.getsockname()[1])

    async def close(self) -> None:
        """Let nobody connect, and cut every connection that is still open."""
        self._closed = True
        _, last = await asyncio.open_connection(*self._socket.getsockname())
        await self._accepting
        self._socket.close()
        last.transport.abort()
        for conversation in self._conversations:
            conversation.cancel()
        await asyncio.gather(*self._conversations, return_exceptions=True)

    async def _accept(self) -> None:
        while not self._closed:
            connection, _ = await asyncio.get_running_loop().sock_accept(self._socket)
            client, to_client = await asyncio.open_connection(sock=connection)
            conversation = asyncio.create_task(self._carry(client, to_client))
            self._conversations.add(conversation)
            conversation.add_done_callback(partial(self._end, to_client))

    def _end(self, to_client: StreamWriter, conversation: asyncio.Task[None]) -> None:
        to_client.transport.abort()
        self._conversations.discard(conversation)

    @abstractmethod
    async def _carry(self, client: StreamReader, to_client: StreamWriter) -> None: ...


@asynccontextmanager
async def listening(carrier: Carrier) -> AsyncIterator[int]:
    """Let it accept connections, at the port that is given."""
    port = await carrier.open()
    try:
        yield port
    finally:
        await carrier.close()


class Wire(Carrier):
    """Carries connections to a server; those open at a `hush` never carry anything again."""

    def __init__(self, connect: Connect) -> None:
        super().__init__()
        self._connect = connect
        self._hushed = asyncio.Event()
        self._answers = asyncio.Event()
        self._answers.set()
        self.asked = asyncio.Event()
        self.round_trips = 0

    def hush(self) -> None:
        """Swallow everything from now on, as a router does that has forgotten its connections."""
        self._hushed.set()

    def hold(self) -> None:
        """Keep answers back until they are released."""
        self._answers.clear()

    def release(self) -> None:
        self._answers.set()

    def mend(self) -> None:
        """Carry new connections again."""
        self._hushed = asyncio.Event()

    async def _carry(self, client: StreamReader, to_client: StreamWriter) -> None:
        hushed = self._hushed
        try:
            server, to_server = await self._connect()
        except OSError:  # the client, whose connection ends now, finds the server away
            return
        asked = asyncio.Event()

        async def ask() -> None:
            while (block := await client.read(_BLOCK_BYTES)) and not hushed.is_set():
                asked.set()
                self.asked.set()
                to_server.write(block)

        async def answer() -> None:
            while (block := await server.read(_BLOCK_BYTES)) and not hushed.is_set():
                self.round_trips += asked.is_set()
                asked.clear()
                await self._answers.wait()
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
    wire = Wire(partial(asyncio.open_connection, str(url.hostname), url.port or 6379))
    async with listening(wire) as port:
        yield wire, f"redis://127.0.0.1:{port}{url.path}"
