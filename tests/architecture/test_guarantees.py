"""Every promise of the page names tests that are there."""

import ast
import re

import pytest

from tests.workers import ROOT

PAGE = (ROOT / "docs/guarantees.md").read_text()
NAMED = re.findall(r"`(tests/\S+\.py)::(test_\w+)`", PAGE)


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_a_test_that_proves_a_promise_is_there(path: str, name: str) -> None:
    module = ast.parse((ROOT / path).read_text())
    functions = [
        one for one in module.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert name in [one.name for one in functions]


def test_each_promise_names_its_tests() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "---" not in line]
    promises = [line for line in rows if not line.startswith("| Promise")]
    assert len(promises) > 20
    assert [line for line in promises if not re.search(r"`tests/\S+::test_\w+`", line)] == []
