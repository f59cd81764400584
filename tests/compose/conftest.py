"""An image built from this checkout, and what it is like, printed at the end."""

import pytest

from tests.compose.stack import build_image
from worker.testing.containers import ContainerError, require_engine

FACTS = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FACTS] = []
    try:
        require_engine()
    except ContainerError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("the image and the smoke test")
    for line in terminalreporter.config.stash[FACTS]:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def facts(pytestconfig: pytest.Config) -> list[str]:
    """Lines that are printed at the end of the run."""
    return pytestconfig.stash[FACTS]


@pytest.fixture(scope="session")
def image() -> None:
    build_image()
