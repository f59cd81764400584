"""An image built from this checkout, and what it is like, printed at the end."""

import pytest

from tests.compose.stack import build_image
from worker.testing.containers import require_engine
from worker.testing.errors import ContainerError

FACTS = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FACTS] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if facts := terminalreporter.config.stash[FACTS]:
        terminalreporter.section("the image and the smoke test")
        for line in facts:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def facts(pytestconfig: pytest.Config) -> list[str]:
    """Lines that are printed at the end of the run."""
    return pytestconfig.stash[FACTS]


@pytest.fixture(scope="session")
def image() -> None:
    try:
        require_engine()
    except ContainerError as error:
        pytest.fail(f"{error}.", pytrace=False)
    build_image()
