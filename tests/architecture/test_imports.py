"""Importing opens, reads and starts nothing, and arrows between packages point only down."""

import ast
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("db", "jobs", "worker")

# The first process learns which packages of others are imported, so that the second has them all
# before it watches: what they do when they are imported is not ours to judge.
IMPORT_ALL = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""
IMPORT_WATCHED = """
import importlib, json, os, sys, threading

SOURCES = (".py", ".pyc", ".so")
FORBIDDEN = ("socket.", "subprocess.", "os.", "shutil.", "tempfile.", "sqlite3.")
HARMLESS = ("os.listdir", "os.scandir")
ASKED_BY_PYDANTIC = ("PYDANTIC_DISABLE_PLUGINS",)

class Environment(dict):
    def __getitem__(self, name):
        if name in ASKED_BY_PYDANTIC:
            raise KeyError(name)
        refuse("reading the variable", name)

    def get(self, name, default=None):
        return default if name in ASKED_BY_PYDANTIC else self[name]

    __contains__ = get

def refuse(what, *details):
    raise PermissionError(f"{what} {details} while importing {importing}")

def watch(event, details):
    if event == "open" and not str(details[0]).endswith(SOURCES):
        refuse(event, *details)
    if event.startswith(FORBIDDEN) and event not in HARMLESS:
        refuse(event, *details)

for name in json.loads(sys.argv[2]):
    try:
        importlib.import_module(name)
    except ImportError:
        pass  # an extension that registers itself under a name of its own
sys.dont_write_bytecode = True
sys.addaudithook(watch)
threading.Thread.start = lambda thread: refuse("starting the thread", thread)
os.environ = Environment()
for importing in json.loads(sys.argv[1]):
    importlib.import_module(importing)
"""


def modules() -> list[str]:
    """Every module of the project by name; found without importing any of them."""
    found = []
    for package in PACKAGES:
        pending = [(package, ROOT / package)]
        while pending:
            name, folder = pending.pop()
            found.append(name)
            for module in pkgutil.iter_modules([str(folder)]):
                inner = f"{name}.{module.name}"
                if module.ispkg:
                    pending.append((inner, folder / module.name))
                else:
                    found.append(inner)
    return sorted(found)


def python(script: str, *arguments: list[str]) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", script, *map(json.dumps, arguments)]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)


def others() -> list[str]:
    """The modules of the standard library and of packages that the project's modules import."""
    imported = python(IMPORT_ALL, modules())
    assert imported.returncode == 0, imported.stderr
    names: list[str] = json.loads(imported.stdout)
    return [name for name in names if name.split(".")[0] not in {*PACKAGES, "__main__"}]


def watched(names: list[str], known: list[str]) -> str:
    """Import the names where the operating system is out of bounds; returns what went wrong."""
    return python(IMPORT_WATCHED, names, known).stderr


def test_importing_a_module_opens_reads_and_starts_nothing() -> None:
    assert watched(modules(), others()) == ""


@pytest.mark.parametrize(
    ("deed", "word"),
    [
        ("open('/etc/hostname')", "open"),
        ("import os; os.getenv('HOME')", "reading the variable"),
        ("import os; os.environ['HOME']", "reading the variable"),
        ("import os; os.mkdir('here')", "os.mkdir"),
        ("import socket; socket.socket()", "socket"),
        ("import subprocess; subprocess.Popen(['true'])", "subprocess.Popen"),
        ("import threading; threading.Thread(target=print).start()", "starting the thread"),
    ],
)
def test_a_module_that_does_something_when_imported_is_caught(
    deed: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "busy_module.py").write_text(deed)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert word in watched(["busy_module"], ["os", "socket", "subprocess", "threading"])


def test_imports_point_only_down() -> None:
    linted = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert linted.returncode == 0, linted.stdout + linted.stderr


UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}


def unpickling(path: Path) -> list[int]:
    """Lines that import what turns bytes into code, or ask for it by an option."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            used = {one.name.partition(".")[0] for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            used = {(node.module or "").partition(".")[0]}
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            used = UNPICKLING
        else:
            continue
        if used & UNPICKLING:
            found.append(node.lineno)
    return found


def test_nothing_unpickles() -> None:
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert sources
    assert [path for path in sources if unpickling(path)] == []


def test_an_unpickler_is_caught(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("import pickle\nfrom dill import loads\nnp.load(f, allow_pickle=True)\n")
    assert sorted(unpickling(module)) == [1, 2, 3]
