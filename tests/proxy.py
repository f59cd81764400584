"""A TCP proxy in front of PostgreSQL that cuts, or holds up, the connection at a message."""

import asyncio
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum
from functools import partial
from pathlib import Path

from sqlalchemy import URL, make_url

from tests.wire import Carrier, Connect, Wire, listening
from worker.embedded import free_port

COMMIT = b"COMMIT;\x00"  # the end of asyncpg's simple query message
_BLOCK_BYTES = 65536


class Cut(Enum):
    """Which part of the conversation about the message gets lost."""

    QUESTION = "the message never reaches the server"
    ANSWER = "the server has answered, the client does not hear it"
    CLIENT = "the client is cut off while the server is still at it"
    SILENCE = "the server has answered, nobody hears it, and the connection stays open at both ends"


BREAKS = (Cut.QUESTION, Cut.ANSWER, Cut.CLIENT)
"""Those that end the connection, so that nobody has to wait for a time limit."""


class Proxy(Carrier):
    """Forwards to PostgreSQL, and cuts where it has been told to."""

    def __init__(self, connect: Connect) -> None:
        super().__init__()
        self._connect = connect
        self._armed: list[tuple[bytes, Cut]] = []
        self._held_at: bytes | None = None
        self._released = asyncio.Event()
        self.cuts: list[Cut] = []
        self.holds = asyncio.Event()

    def lead_to(self, database_url: str) -> None:
        """Have new connections go to another server."""
        self._connect = _way_to(make_url(database_url))

    def arm(self, *cuts: Cut, at: bytes = COMMIT) -> None:
        """Cut at the next messages with these bytes in them, one after the other."""
        self._armed += [(at, cut) for cut in cuts]

    def hold(self, at: bytes) -> None:
        """Keep back the next message with these bytes in it, and what follows, until `release`."""
        self._held_at = at
        self._released = asyncio.Event()
        self.holds.clear()

    def release(self) -> None:
        """Let through what is held."""
        self._released.set()

    async def let_pass(self, block: bytes) -> None:
        """Return once the block may go on."""
        if self._held_at is not None and self._held_at in block:
            self._held_at = None
            released = self._released
            self.holds.set()
            await released.wait()

    async def _carry(self, client: StreamReader, to_client: StreamWriter) -> None:
        try:
            server, to_server = await self._connect()
        except OSError:  # the client, whose connection ends now, finds the server away
            return
        conversation = _Conversation(self, to_client, to_server)
        try:
            await asyncio.gather(conversation.ask(client), conversation.answer(server))
        finally:
            conversation.end()

    def take_cut(self, block: bytes) -> Cut | None:
        """The cut that is due at these bytes; each is given once."""
        if not self._armed or self._armed[0][0] not in block:
            return None
        _, cut = self._armed.pop(0)
        self.cuts.append(cut)
        return cut


class _Conversation:
    def __init__(self, proxy: Proxy, to_client: StreamWriter, to_server: StreamWriter) -> None:
        self._proxy = proxy
        self._to_client = to_client
        self._to_server = to_server
        self._answer_is_lost = False
        self._is_silent = False

    async def ask(self, client: StreamReader) -> None:
        async for block in _blocks(client):
            if self._is_silent:
                continue
            await self._proxy.let_pass(block)
            cut = self._proxy.take_cut(block)
            if cut is Cut.QUESTION:
                break
            self._answer_is_lost = cut is Cut.ANSWER
            self._is_silent = cut is Cut.SILENCE
            self._to_server.write(block)
            if cut is Cut.CLIENT:
                self._to_client.transport.abort()
                return
        self.end()

    async def answer(self, server: StreamReader) -> None:
        async for block in _blocks(server):
            if self._answer_is_lost or self._to_client.is_closing():
                break
            if not self._is_silent:
                self._to_client.write(block)
        self.end()

    def end(self) -> None:
        self._to_client.transport.abort()
        self._to_server.transport.abort()


async def _blocks(reader: StreamReader) -> AsyncIterator[bytes]:
    try:
        while block := await reader.read(_BLOCK_BYTES):
            yield block
    except ConnectionError:
        return


@asynccontextmanager
async def proxied(database_url: str) -> AsyncIterator[tuple[Proxy, str]]:
    """A proxy, and the URL that leads through it to the same database."""
    url = make_url(database_url)
    proxy = Proxy(_way_to(url))
    async with listening(proxy) as port:
        yield proxy, _through(url, port)


@asynccontextmanager
async def hushable(database_url: str) -> AsyncIterator[tuple[Wire, str]]:
    """A wire that can go dead, and the URL that leads through it to the same database."""
    url = make_url(database_url)
    wire = Wire(_way_to(url))
    async with listening(wire) as port:
        yield wire, _through(url, port)


class Road:
    """Another way to the same database, which can be closed; it is closed at first."""

    def __init__(self, database_url: str) -> None:
        url, self._port = make_url(database_url), free_port()
        self.url = _through(url, self._port)
        self._proxy = Proxy(_way_to(url))

    async def open(self) -> None:
        await self._proxy.open(self._port)

    async def close(self) -> None:
        """Let nobody connect, and cut off everybody."""
        await self._proxy.close()

    def lead_to(self, database_url: str) -> None:
        """Have new connections go to another server, which has the same database."""
        self._proxy.lead_to(database_url)


def _way_to(url: URL) -> Connect:
    """To the Unix socket or the port that the URL names."""
    if "host" in url.query:
        path = Path(str(url.query["host"])) / f".s.PGSQL.{url.query.get('port', '5432')}"
        return partial(asyncio.open_unix_connection, path)
    return partial(asyncio.open_connection, url.host, url.port or 5432)


def _through(url: URL, port: int) -> str:
    through = url.difference_update_query(["host", "port"]).set(host="127.0.0.1", port=port)
    return through.update_query_dict({"ssl": "disable"}).render_as_string(hide_password=False)
