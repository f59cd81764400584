"""Turns of chunks: two are under way at a time, and yet they take effect one after the other."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

C = TypeVar("C")
R = TypeVar("R")


class Turn:
    """One chunk's place in the line.

    Its transaction may begin at any time. Its rows may go in when those of the chunk before are
    in, which can then wait for no row of this one, and it may commit when that one has committed.
    """

    def __init__(self, before: "Turn | None" = None) -> None:
        self._before = before
        self.wrote = asyncio.Event()
        self.done = asyncio.Event()
        self._begun = False
        self._behind: asyncio.Task[Any] | None = None

    def followed_by(self, behind: "asyncio.Task[Any]") -> None:
        self._behind = behind

    async def begin(self) -> None:
        """Begin a try. Before a repeated one, what may stand on the last one is rolled back.

        So is what waits for it, which might hold the connection that it needs.
        """
        if self._begun and self._behind is not None:
            await cancel(self._behind)
        self._begun = True
        self.wrote.clear()

    async def may_write(self) -> None:
        """Wait until the rows of the chunk before are in."""
        if self._before is not None:
            await self._before.wrote.wait()

    async def may_look(self) -> None:
        """Wait until everything that stands before this chunk can be seen."""
        if self._before is not None:
            await self._before.done.wait()
            self._before = None

    def rows_are_in(self) -> None:
        """Say that this chunk needs no other lock."""
        self.wrote.set()

    def committed(self) -> None:
        self.wrote.set()
        self.done.set()


@dataclass
class _UnderWay(Generic[C, R]):
    chunk: C
    turn: Turn
    task: "asyncio.Task[R]"


async def in_turn(
    chunks: AsyncIterator[C], commit: Callable[[C, Turn], Awaitable[R]], context: Context
) -> AsyncGenerator[R, None]:
    """Commit the chunks in order, and give back what each commit returned.

    A chunk commits only after the one before was given back and the next was asked for. Whoever
    stops asking, or fails, leaves nothing under way.
    """

    def start(chunk: C, before: Turn | None) -> _UnderWay[C, R]:
        async def run() -> R:
            return await commit(chunk, turn)

        turn = Turn(before)
        task = asyncio.create_task(run(), context=context.copy())
        if before is not None:
            before.followed_by(task)
        return _UnderWay(chunk, turn, task)

    first: _UnderWay[C, R] | None = None
    second: _UnderWay[C, R] | None = None
    try:
        async for chunk in chunks:
            if first is None:
                first = start(chunk, None)
                continue
            second = start(chunk, first.turn)
            yield await first.task
            first.turn.committed()
            first, second = second, None
            if first.task.cancelled():
                first = start(first.chunk, None)
        if first is not None:
            yield await first.task
    finally:
        for one in filter(None, (second, first)):
            await cancel(one.task)


async def one_ahead(chunks: AsyncGenerator[C, None], context: Context) -> AsyncGenerator[C, None]:
    """The chunks, the next one made ready in that context while the one before is used."""

    async def get() -> C | None:
        return await anext(chunks, None)

    def start() -> "asyncio.Task[C | None]":
        return asyncio.create_task(get(), context=context.copy())

    coming = start()
    try:
        while (chunk := await coming) is not None:
            coming = start()
            yield chunk
    finally:
        await _settle(coming)
        await chunks.aclose()


async def cancel(task: "asyncio.Task[Any]") -> None:
    """Cancel what may still run, and wait until it has rolled back."""
    task.cancel()
    await _settle(task)


async def _settle(task: "asyncio.Task[Any]") -> None:
    """Wait for the end of a task whose error is nobody's any more."""
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()
