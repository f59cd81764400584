"""Which servers the tests use: read from the environment, and refused in a sentence."""

import pytest

from tests.workers import ROOT
from worker.settings import SettingsError
from worker.testing.choice import Source, choose_servers

POSTGRES = "postgresql://tester:geheim@db.example/postgres"
REDIS = "redis://cache.example/0"


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVERS", "DATABASE_URL", "REDIS_URL"):
        monkeypatch.delenv(f"BULWARK_TEST_{name}", raising=False)
    for name in ("POSTGRES_IMAGE", "REDIS_IMAGE"):
        monkeypatch.delenv(name, raising=False)


def test_nothing_said_means_embedded_servers_and_the_images_of_the_compose_file() -> None:
    choice = choose_servers()
    assert choice.servers is Source.EMBEDDED
    compose_file = (ROOT / "docker-compose.yml").read_text()
    assert f"${{POSTGRES_IMAGE:-{choice.postgres_image}}}" in compose_file
    assert f"${{REDIS_IMAGE:-{choice.redis_image}}}" in compose_file


def test_the_images_of_containers_may_be_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BULWARK_TEST_SERVERS", "containers")
    monkeypatch.setenv("POSTGRES_IMAGE", "postgres:15")
    monkeypatch.setenv("REDIS_IMAGE", "redis:7")
    choice = choose_servers()
    assert (choice.postgres_image, choice.redis_image) == ("postgres:15", "redis:7")


def test_given_servers_are_both_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BULWARK_TEST_SERVERS", "url")
    monkeypatch.setenv("BULWARK_TEST_DATABASE_URL", POSTGRES)
    with pytest.raises(SettingsError, match=r"url needs .*_DATABASE_URL, .*_REDIS_URL.*: set both"):
        choose_servers()
    monkeypatch.setenv("BULWARK_TEST_REDIS_URL", REDIS)
    choice = choose_servers()
    assert choice.database_url is not None
    assert choice.database_url.get_secret_value().startswith("postgresql+asyncpg://tester:geheim@")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("BULWARK_TEST_SERVERS", "docker", "BULWARK_TEST_SERVERS: .*'embedded', 'containers'"),
        ("BULWARK_TEST_SERVER", "url", "BULWARK_TEST_SERVER is not a setting: did you mean"),
        ("BULWARK_TEST_REDIS_URL", "http://geheim", "BULWARK_TEST_REDIS_URL: its scheme is 'http'"),
        (
            "BULWARK_TEST_REDIS_URL",
            "redis+sentinel://:geheim@one,two/main/0",
            "^BULWARK_TEST_REDIS_URL: .* not behind Sentinel; name its master's address.$",
        ),
        (
            "BULWARK_TEST_REDIS_URL",
            "rediss+sentinel://:geheim@one/main/0",
            "^BULWARK_TEST_REDIS_URL: .* not behind Sentinel; name its master's address.$",
        ),
    ],
)
def test_what_cannot_be_used_is_told_with_its_variable(
    name: str, value: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=sentence) as told:
        choose_servers()
    assert "geheim" not in str(told.value)
