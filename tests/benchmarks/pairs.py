"""Side by side: reference and ours in turn, so that both meet the machine in the same moods."""

import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from tests.benchmarks.measure import Figure, Target

T = TypeVar("T")
Run = Callable[[], Awaitable[T]]


@dataclass(frozen=True)
class Pair(Generic[T]):
    """A run of the reference and one of ours, one right after the other."""

    reference: T
    ours: T


async def alternate(pairs: int, reference: Run[T], ours: Run[T]) -> list[Pair[T]]:
    """Run both, pair by pair; every other pair begins with ours."""
    done = []
    for number in range(pairs):
        if number % 2 == 0:
            theirs = await reference()
            done.append(Pair(theirs, await ours()))
        else:
            own = await ours()
            done.append(Pair(await reference(), own))
    return done


def median_figure(
    pairs: Sequence[Pair[T]],
    value: Callable[[T], float],
    *,
    name: str,
    unit: str,
    target: Target | None = None,
) -> Figure:
    """The medians of both, and of the ratio within the pairs."""
    both = [(value(pair.ours), value(pair.reference)) for pair in pairs]
    return Figure(
        name,
        unit,
        ours=statistics.median(own for own, _ in both),
        reference=statistics.median(theirs for _, theirs in both),
        ratio=statistics.median(own / theirs for own, theirs in both),
        target=target,
    )
