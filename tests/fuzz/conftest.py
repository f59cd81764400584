"""What the fuzz tests share: the count of what they try."""

from collections.abc import Callable, Iterator

import pytest

from tests.fuzzing import PROPERTY, Tried


@pytest.fixture
def tried(record_property: Callable[[str, object], None]) -> Iterator[Tried]:
    """Counts what this test tries, and has it told at the end of the run."""
    count = Tried()
    yield count
    record_property(PROPERTY, count.inputs)
