"""How many inputs the fuzz tests try, from which seed, and the count that is told at the end.

`make test` tries the same inputs every time. FUZZ_TIMES, a factor, tries so many times as many,
chosen by the seed of the run: `make fuzz`.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

PROPERTY: Final = "fuzz_inputs"
TIMES: Final = int(os.environ.get("FUZZ_TIMES", "0"))

JSON: Final = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


class Tried:
    """Counts the inputs that one test has tried."""

    def __init__(self) -> None:
        self.inputs = 0

    def one(self) -> None:
        self.inputs += 1


def fuzzed(inputs: int) -> Callable[[Any], Any]:
    """So many inputs for a test, or as many times more as FUZZ_TIMES says."""
    return settings(
        max_examples=inputs * max(1, TIMES),
        derandomize=not TIMES,
        database=None,
        print_blob=True,
        phases=[Phase.explicit, Phase.generate],  # an input takes servers: slow to shrink
        suppress_health_check=list(HealthCheck),
    )


def summary(reports: Iterable[Any]) -> str | None:
    """How many inputs were tried by the tests of these reports, if any is a fuzz test."""
    counts = [
        value
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "teardown"
        for name, value in report.user_properties
        if name == PROPERTY
    ]
    if not counts:
        return None
    return f"fuzz: {sum(map(int, map(str, counts))):,} inputs tried by {len(counts)} tests"
