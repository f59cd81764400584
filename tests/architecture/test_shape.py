"""The shape of the code: short functions, telling names, and folders that shadow nothing."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import db.ledger

ROOT = Path(__file__).parents[2]
FOLDERS = ("db", "jobs", "worker", "tests", "alembic")
MAX_FUNCTION_LINES = 60
NAMES_THAT_SAY_NOTHING = {"base", "common", "helpers", "manager", "misc", "tools", "util", "utils"}


def files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def too_long(path: Path) -> list[str]:
    return [
        f"{path}:{function.lineno} {function.name}"
        for function in functions(path)
        if (function.end_lineno or 0) - function.lineno + 1 > MAX_FUNCTION_LINES
    ]


def broad_excepts(path: Path) -> list[str]:
    """Handlers that catch what they do not name."""
    return [
        f"{path}:{node.lineno}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"})
    ]


def test_the_files_are_found() -> None:
    assert ROOT / "worker" / "embedded" / "postgres.py" in files()


def test_no_function_is_longer_than_a_screen() -> None:
    assert [place for path in files() for place in too_long(path)] == []


@pytest.mark.parametrize(("lines", "found"), [(60, 0), (61, 1)])
def test_a_function_of_too_many_lines_is_caught(lines: int, found: int, tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("async def f():\n" + "    pass\n" * (lines - 1))
    assert len(too_long(module)) == found


def test_every_module_says_what_it_is_for() -> None:
    silent = [path for path in files() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


def test_no_file_is_named_after_nothing() -> None:
    assert [path for path in files() if path.stem.strip("_") in NAMES_THAT_SAY_NOTHING] == []


def test_only_the_execution_of_a_job_catches_every_error() -> None:
    sources = [path for path in files() if path != ROOT / "worker" / "execution.py"]
    assert [place for path in sources for place in broad_excepts(path)] == []


def test_a_broad_except_is_caught(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("try:\n    pass\nexcept Exception:\n    pass\n")
    assert broad_excepts(module) == [f"{module}:3"]


@pytest.mark.parametrize("shadow", ["alembic/__init__.py", "tests/__init__.py"])
def test_no_folder_shadows_a_package(shadow: str) -> None:
    assert not (ROOT / shadow).exists()


def test_the_ledger_has_all_its_modules_so_that_a_new_migration_drops_no_table() -> None:
    """alembic compares the database with the tables of what `db.ledger` imports."""
    modules = {path.stem for path in (ROOT / "db/ledger").glob("*.py")} - {"__init__"}

    assert {*db.ledger.__all__} == modules
