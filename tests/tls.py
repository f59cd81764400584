"""PostgreSQL and Redis that speak TLS, as the servers of the wheels cannot: in containers."""

import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import docker
import pytest
from docker.errors import DockerException
from testcontainers.core.container import DockerContainer
from testcontainers.core.wait_strategies import LogMessageWaitStrategy

from worker.testing.choice import choose_servers
from worker.testing.containers import require_engine
from worker.testing.errors import ContainerError

HOST = "localhost"
OTHER_HOST = "127.0.0.1"
"""The same server, under a name that its certificate does not have."""
_FILES = 'printf %s "$TLS_CRT" > /tmp/tls.crt; printf %s "$TLS_KEY" > /tmp/tls.key; '
_POSTGRES = (
    f"{_FILES} chown postgres /tmp/tls.key; chmod 600 /tmp/tls.key; "
    "exec docker-entrypoint.sh postgres -c ssl=on "
    "-c ssl_cert_file=/tmp/tls.crt -c ssl_key_file=/tmp/tls.key"
)
_REDIS = (
    f'{_FILES} exec "$(command -v valkey-server || command -v redis-server)" --bind 0.0.0.0 '
    "--protected-mode no --save '' --port 0 --tls-port 6379 --tls-auth-clients no "
    "--tls-cert-file /tmp/tls.crt --tls-key-file /tmp/tls.key --tls-ca-cert-file /tmp/tls.crt"
)
_TIMEOUT_S = 60


class Authority:
    """A certificate authority of the tests' own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self.file = folder / "ca.crt"
        _openssl(folder, "req", "-x509", "-subj", "/CN=authority", *_key("ca"), "-out", "ca.crt")

    def certificate(self, host: str) -> dict[str, str]:
        """A certificate for this host and its key, as variables for a container."""
        subject = ["-subj", f"/CN={host}", "-addext", f"subjectAltName=DNS:{host}"]
        signed = ["-CA", "ca.crt", "-CAkey", "ca.key", "-out", "tls.crt"]
        _openssl(self._folder, "req", "-x509", *subject, *_key("tls"), *signed)
        names = {"TLS_CRT": "tls.crt", "TLS_KEY": "tls.key"}
        return {name: (self._folder / file).read_text() for name, file in names.items()}


@contextmanager
def tls_postgres(authority: Authority) -> Iterator[int]:
    """The port of a PostgreSQL with an empty database, while the block lasts."""
    image = _at_hand(choose_servers().postgres_image)
    names = dict.fromkeys(("POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_DB"), "bulwark")
    ready = LogMessageWaitStrategy("database system is ready to accept connections", times=2)
    with _running(image, _POSTGRES, 5432, ready, authority, names) as port:
        yield port


@contextmanager
def tls_redis(authority: Authority) -> Iterator[int]:
    """The port of a Redis, while the block lasts."""
    image = _at_hand(choose_servers().redis_image)
    ready = LogMessageWaitStrategy("Ready to accept connections")
    with _running(image, _REDIS, 6379, ready, authority, {}) as port:
        yield port


@contextmanager
def _running(
    image: str,
    script: str,
    port: int,
    ready: LogMessageWaitStrategy,
    authority: Authority,
    variables: dict[str, str],
) -> Iterator[int]:
    container = (
        DockerContainer(image)
        .with_command(["sh", "-euc", script])
        .with_envs(**variables, **authority.certificate(HOST))
        .waiting_for(ready.with_startup_timeout(_TIMEOUT_S))
    )
    container.ports[f"{port}/tcp"] = (OTHER_HOST, None)  # type: ignore[assignment]  # docker-py takes more than is declared
    with container:
        yield container.get_exposed_port(port)


def _at_hand(image: str) -> str:
    """The image, if there is an engine that has it; nothing is pulled for these tests alone."""
    try:
        require_engine()
        with closing(docker.from_env()) as client:
            client.images.get(image)
    except (ContainerError, DockerException) as error:
        pytest.skip(f"no server that speaks TLS: the image {image} is not at hand ({error})")
    return image


def _key(name: str) -> list[str]:
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    return [*curve, "-nodes", "-keyout", f"{name}.key", "-days", "2"]


def _openssl(folder: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)
