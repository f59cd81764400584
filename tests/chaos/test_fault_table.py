"""The table that `make chaos` prints also tells which faults were not provoked."""

from typing import Literal

import pytest

from tests.chaos.conftest import PROVOKES, FaultTable


def skipped(when: Literal["setup", "call"], *properties: tuple[str, object]) -> pytest.TestReport:
    reason = ("test_disk.py", 9, "Skipped: only [root] may mount a disk")
    place = ("test_disk.py", 9, "test_a_full_disk")
    return pytest.TestReport(
        "test_disk.py::test_a_full_disk",
        place,
        {},
        "skipped",
        reason,
        when,
        (),
        0,
        0,
        0,
        properties,
    )


@pytest.mark.parametrize("when", ["setup", "call"])
def test_a_fault_whose_test_was_skipped_is_told_with_the_reason(
    when: Literal["setup", "call"], capsys: pytest.CaptureFixture[str]
) -> None:
    table = FaultTable()
    table.pytest_runtest_logreport(skipped(when, (PROVOKES, "test_a_full_disk")))
    table.pytest_runtest_logreport(skipped(when))
    table.pytest_terminal_summary()
    *_, line = capsys.readouterr().out.splitlines()
    assert line == "not provoked: only [root] may mount a disk (test_a_full_disk)"


@pytest.mark.usefixtures("provoked")
def test_the_reports_of_a_test_that_is_to_provoke_a_fault_say_so(
    request: pytest.FixtureRequest,
) -> None:
    name = "test_the_reports_of_a_test_that_is_to_provoke_a_fault_say_so"
    assert (PROVOKES, name) in request.node.user_properties
