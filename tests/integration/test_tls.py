"""TLS to PostgreSQL and Redis: who is believed, and what is said of who is not."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.tls import HOST, OTHER_HOST, Authority, tls_postgres, tls_redis
from tests.workers import Start, environment, run_bulwark, until
from worker.exit_codes import ExitCode


class Servers(NamedTuple):
    """Where both are, and who has signed their certificates."""

    postgres_port: int
    redis_port: int
    authority: Path
    stranger: Path

    def env(self, host: str, authority: Path) -> dict[str, str]:
        """The environment of who believes this authority."""
        database_url = (
            f"postgresql://bulwark:bulwark@{host}:{self.postgres_port}/bulwark?ssl=require"
        )
        redis_url = f"rediss://{host}:{self.redis_port}/0?ssl_ca_certs={authority}"
        return {**environment(database_url, redis_url), "PGSSLROOTCERT": str(authority)}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("tls")
    ours, stranger = Authority(folder / "ours"), Authority(folder / "stranger")
    with tls_postgres(ours) as postgres_port, tls_redis(ours) as redis_port:
        yield Servers(postgres_port, redis_port, ours.file, stranger.file)


async def test_a_worker_serves_where_host_and_authority_are_right(
    servers: Servers, start: Start, tmp_path: Path
) -> None:
    env = servers.env(HOST, servers.authority)
    migrated = run_bulwark("migrate", env=env, folder=tmp_path)
    assert migrated.returncode == ExitCode.OK, migrated.stderr
    worker = start(env)

    async def healthy() -> bool:
        return run_bulwark("health", env=env, folder=tmp_path).returncode == ExitCode.OK

    await until(healthy, "all is well")
    assert worker.terminate() == 0


@pytest.mark.parametrize(
    ("host", "is_stranger", "reason"),
    [
        (OTHER_HOST, False, f"IP address mismatch, certificate is not valid for '{OTHER_HOST}'"),
        (HOST, True, "unable to get local issuer certificate"),
    ],
)
def test_another_host_and_an_unknown_authority_are_refused_in_a_sentence(
    servers: Servers, tmp_path: Path, host: str, is_stranger: bool, reason: str
) -> None:
    authority = servers.stranger if is_stranger else servers.authority
    told = run_bulwark("health", "--json", env=servers.env(host, authority), folder=tmp_path)
    assert told.returncode == ExitCode.FAILED, told.stderr
    of_postgres, of_redis = json.loads(told.stdout)["faults"]
    assert of_postgres.startswith("PostgreSQL cannot be reached: ")
    assert of_redis.startswith("Redis cannot be used: ")
    assert reason in of_postgres
    assert reason in of_redis


def test_without_an_authority_postgresql_is_not_believed(servers: Servers, tmp_path: Path) -> None:
    env = servers.env(HOST, servers.authority) | {"PGSSLROOTCERT": "", "HOME": str(tmp_path)}
    told = run_bulwark("migrate", env=env, folder=tmp_path)
    assert told.returncode == ExitCode.UNREACHABLE
    assert "PostgreSQL cannot be reached: root certificate file" in told.stderr
    assert "Traceback" not in told.stderr
