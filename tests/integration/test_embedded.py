"""The embedded servers: they answer, survive a restart, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import redis
from sqlalchemy.engine import make_url

from tests.stage import connected
from worker.embedded import (
    Embedded,
    EmbeddedPostgres,
    EmbeddedServerError,
    embedded_postgres,
    embedded_servers,
    embedded_valkey,
)
from worker.embedded.home import has_memory

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
ENDED_WITHIN_S = 60.0

OWNER = """
import sys
from pathlib import Path
from worker.embedded import embedded_servers
folder = Path(sys.argv[1]) if sys.argv[1:] else None
with embedded_servers(folder, durable=False) as running:
    print(running.folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def servers() -> Iterator[Embedded]:
    with embedded_servers(durable=False) as running:
        yield running


async def ask(url: str, query: str) -> object:
    async with connected(url) as connection:
        return await connection.fetchval(query)


def ping(url: str) -> bool:
    with redis.Redis.from_url(url) as client:
        return bool(client.ping())


def socket_folder(url: str) -> Path:
    host = make_url(url).query["host"]
    assert isinstance(host, str)
    return Path(host)


@contextmanager
def an_owner(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that runs the servers until its standard input ends; also their folder."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    with owner:
        assert owner.stdout is not None
        yield owner, Path(owner.stdout.readline().rstrip("\n"))


def descendants(pid: int) -> list[psutil.Process]:
    """What the process started: servers, the processes that PostgreSQL started, and the guard."""
    return psutil.Process(pid).children(recursive=True)


def assert_both_servers_are_among(processes: list[psutil.Process]) -> None:
    assert {"postgres", "valkey-server"} <= {process.name() for process in processes}


async def test_both_servers_answer(servers: Embedded) -> None:
    assert str(await ask(servers.database_url, "SHOW server_version")).startswith("18.")
    assert ping(servers.redis_url)


async def test_there_is_room_for_many_workers(servers: Embedded) -> None:
    assert await ask(servers.database_url, "SHOW max_connections") == "200"


async def test_postgresql_keeps_its_promises_unless_told_otherwise(tmp_path: Path) -> None:
    promises = "SELECT string_agg(setting, ' ' ORDER BY name) FROM pg_settings"
    promises += " WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit')"
    with embedded_postgres(tmp_path) as postgres:
        assert await ask(postgres.url, promises) == "on on on"
    with embedded_postgres(tmp_path, durable=False) as postgres:
        assert await ask(postgres.url, promises) == "off off off"


async def test_a_given_folder_keeps_the_database_for_the_next_time(tmp_path: Path) -> None:
    with embedded_postgres(tmp_path) as postgres:
        await ask(postgres.url, "CREATE TABLE kept AS SELECT 42 AS answer")
    with embedded_postgres(tmp_path) as postgres:
        assert await ask(postgres.url, "SELECT answer FROM kept") == 42


async def test_a_folder_may_be_deep_and_have_spaces(tmp_path: Path) -> None:
    folder = tmp_path / "two words" / ("x" * 120)
    with embedded_servers(folder, durable=False) as running:
        sockets = socket_folder(running.database_url)
        assert await ask(running.database_url, "SELECT 1") == 1
        assert ping(running.redis_url)
    assert not sockets.exists()


async def test_an_unfinished_cluster_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "postgresql.new").mkdir()
    (tmp_path / "postgresql.new" / "PG_VERSION").write_text("18\n")
    with embedded_postgres(tmp_path, durable=False) as postgres:
        assert await ask(postgres.url, "SELECT 1") == 1


@pytest.mark.parametrize("mode", ["smart", "fast", "immediate"])
async def test_postgresql_comes_back_at_the_same_address_with_its_data(
    own_postgres: EmbeddedPostgres, mode: str
) -> None:
    url, pid = own_postgres.url, own_postgres.pid
    await ask(url, "CREATE TABLE kept AS SELECT 7 AS answer")
    own_postgres.stop(mode)  # type: ignore[arg-type]  # a parameter of the test
    with pytest.raises((FileNotFoundError, ConnectionRefusedError)):
        await ask(url, "SELECT 1")
    own_postgres.start()
    assert own_postgres.url == url
    assert own_postgres.pid != pid
    assert await ask(url, "SELECT answer FROM kept") == 7


@pytest.fixture
def own_postgres(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    with embedded_postgres(tmp_path) as postgres:
        yield postgres


def test_valkey_comes_back_at_the_same_address_empty(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path) as valkey, redis.Redis.from_url(valkey.url) as client:
        client.set("rung", "1")
        valkey.kill()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        valkey.start()
        assert client.get("rung") is None


def test_a_server_that_does_not_run_has_no_process_and_stops_again_in_peace() -> None:
    with embedded_valkey() as valkey:
        valkey.stop()
        valkey.stop()
        with pytest.raises(EmbeddedServerError, match=r"Valkey is not running: call start\(\)"):
            _ = valkey.pid


def test_a_folder_in_use_is_refused_with_the_words_of_postgresql(tmp_path: Path) -> None:
    with (
        embedded_postgres(tmp_path, durable=False) as postgres,
        pytest.raises(EmbeddedServerError, match=f"PID {postgres.pid}"),
        embedded_postgres(tmp_path, durable=False),
    ):
        pytest.fail("a second server started in the same folder")


def test_the_terminal_does_not_interrupt_the_servers() -> None:
    with embedded_valkey() as valkey:
        assert os.getsid(valkey.pid) != os.getsid(0)


def servers_of_a_block_that_raises(error: BaseException) -> list[psutil.Process]:
    """Raise the error beside running servers; returns what ran when it went through."""
    before = descendants(os.getpid())
    started: list[psutil.Process] = []
    with suppress(type(error)), embedded_servers(durable=False):
        started += [process for process in descendants(os.getpid()) if process not in before]
        assert_both_servers_are_among(started)
        raise error
    return started


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), SystemExit()])
def test_an_error_in_the_block_stops_the_servers(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    started = servers_of_a_block_that_raises(error)
    assert started
    assert not any(process.is_running() for process in started)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_anywhere(tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("TMPDIR", "HOME", "XDG_RUNTIME_DIR")}
    for place in places.values():
        place.mkdir()
    with an_owner(**{name: str(place) for name, place in places.items()}) as (owner, folder):
        assert folder.is_dir()
        assert folder.is_relative_to(places["TMPDIR"])
        started = descendants(owner.pid)
        assert_both_servers_are_among(started)
        owner.communicate()
    assert owner.returncode == 0
    assert not any(process.is_running() for process in started)
    assert [list(place.iterdir()) for place in places.values()] == [[], [], []]


@pytest.mark.skipif(not has_memory(), reason="this system has no folder in memory with room")
def test_servers_in_memory_leave_nothing_there() -> None:
    with embedded_servers(durable=False, in_memory=True) as running:
        assert running.folder.is_relative_to("/dev/shm")
    assert not running.folder.exists()


@pytest.mark.parametrize("deadly", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_of_an_owner_that_was_killed(deadly: signal.Signals) -> None:
    with an_owner() as (owner, folder):
        started = descendants(owner.pid)
        assert_both_servers_are_among(started)
        assert folder.is_dir()
        owner.send_signal(deadly)
    assert psutil.wait_procs(started, timeout=ENDED_WITHIN_S)[1] == []
    assert not folder.exists()


def test_a_given_folder_survives_an_owner_that_was_killed(tmp_path: Path) -> None:
    with an_owner(str(tmp_path)) as (owner, folder):
        started = descendants(owner.pid)
        assert_both_servers_are_among(started)
        owner.kill()
    assert psutil.wait_procs(started, timeout=ENDED_WITHIN_S)[1] == []
    assert folder == tmp_path
    assert (folder / "postgresql" / "PG_VERSION").read_text() == "18\n"
    assert not (folder / "postgresql" / "postmaster.pid").exists()


def test_without_the_wheels_one_sentence_says_what_to_install() -> None:
    without_packages = [sys.executable, "-S", "-c", OWNER]
    ended = subprocess.run(without_packages, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].endswith("pip install 'bulwark-worker[embedded]'.")
