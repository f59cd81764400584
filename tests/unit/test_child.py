"""SIGTERM ends the block as Ctrl-C does, whatever the program is doing when it comes."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import suppress

import pytest

from worker.child import stopping_like_ctrl_c
from worker.shutdown import interruptible


class Terminated:
    """Sends SIGTERM to its process where no exception gets out."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def interrupts_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_that_comes_inside_a_finalizer_stops_the_main_task() -> None:
    tidied = []

    async def play() -> None:
        try:
            async with asyncio.timeout(30):
                Terminated()
                await asyncio.Event().wait()
        finally:
            tidied.append(True)

    with pytest.raises(KeyboardInterrupt), stopping_like_ctrl_c():
        asyncio.run(play())

    assert tidied == [True]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_would_be_taken_for_the_end_of_a_timeout_ends_the_work(
    number: signal.Signals,
) -> None:
    async def play() -> None:
        signal.raise_signal(number)
        with suppress(TimeoutError):
            async with asyncio.timeout(0):
                await asyncio.Event().wait()
        await asyncio.sleep(10)  # so long the interrupt may take
        pytest.fail("the interrupt was lost")

    with pytest.raises(KeyboardInterrupt), stopping_like_ctrl_c():
        asyncio.run(interruptible(play()))


def test_sigterm_ends_the_block_where_interrupts_are_ignored(interrupts_ignored: None) -> None:
    with pytest.raises(KeyboardInterrupt), stopping_like_ctrl_c():
        signal.raise_signal(signal.SIGTERM)


def test_the_handlers_of_before_are_back_after_the_block() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    with stopping_like_ctrl_c():
        assert signal.getsignal(signal.SIGTERM) != before[0]

    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)) == before
