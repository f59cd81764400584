"""The pace of batches: each takes about as long as it may."""

import pytest

from jobs._pace import Pace


def after(*seconds: float, rows: int = 1000) -> int:
    """The size of the next batch after full ones that took so long; each may take a second."""
    pace = Pace(rows, 1.0)
    for one in seconds:
        pace.took(pace.rows, one)
    return pace.rows


@pytest.mark.parametrize(("took_s", "rows"), [(1.0, 1000), (0.8, 1250), (0.01, 2000), (9.0, 500)])
def test_it_comes_nearer_to_the_target_by_at_most_a_factor_of_two(took_s: float, rows: int) -> None:
    assert after(took_s) == rows


def test_it_settles_where_a_batch_takes_as_long_as_it_may() -> None:
    pace = Pace(5_000, 0.5)
    for _ in range(20):
        pace.took(pace.rows, 0.01 + pace.rows / 10_000)
    assert pace.rows == pytest.approx(4_900, rel=0.01)


def test_batches_that_are_slow_however_small_they_are_do_not_dwindle() -> None:
    assert after(*[9.0] * 20) == 100
    assert after(*[9.0] * 20, rows=30) == 30


def test_they_do_not_grow_without_bounds() -> None:
    assert after(*[0.0] * 20) == 100_000


def test_a_batch_that_was_not_full_says_nothing() -> None:
    pace = Pace(1000, 1.0)
    pace.took(10, 9.0)
    assert pace.rows == 1000
