"""Files that commands write: they become regular files, or one sentence says why not."""

import asyncio
import os
import stat
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.command_line import Cli, make_cli, sentence
from tests.inprocess import Bench
from tests.sealing import change_heroes
from worker.exit_codes import BadInput
from worker.whole_file import whole_file

pytestmark = pytest.mark.once

NOWHERE = "postgresql://postgres@/postgres?host=/nonexistent&port=5432"
JOB = "01900000-0000-7000-8000-000000000000"
COMMANDS = [("audit", "export"), ("rejects", JOB, "--export")]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, to work in, with whatever may have a name; the pipe stands for any device."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("file").write_text("kept")
    Path("to_pipe").symlink_to("pipe")
    Path("to_folder").symlink_to("folder")
    Path("circle").symlink_to("circle")
    return folder


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Of what kind each name is, and how large."""
    return {
        str(path.relative_to(folder)): (stat.S_IFMT(path.lstat().st_mode), path.lstat().st_size)
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("command", COMMANDS, ids=["audit", "rejects"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "'' is no name of a file; - writes to stdout."),
        (".", "'.' is no name of a file; - writes to stdout."),
        ("/", "'/' is no name of a file; - writes to stdout."),
        ("no\0name", "'no\\x00name' is no name of a file; - writes to stdout."),
        ("..", ".. is a folder; name a file in it, or give - for stdout."),
        ("folder", "folder is a folder; name a file in it, or give - for stdout."),
        ("to_folder", "to_folder is a folder; name a file in it, or give - for stdout."),
        ("pipe", "pipe is no regular file; - writes to stdout, which may be any pipe."),
        ("to_pipe", "to_pipe is no regular file; - writes to stdout, which may be any pipe."),
        ("circle", "The file circle cannot be written: Too many levels of symbolic links."),
        ("file/in", "The file file/in cannot be written: Not a directory."),
        ("x" * 300, f"The file {'x' * 300} cannot be written: File name too long."),
    ],
)
def test_what_is_no_regular_file_is_refused_before_anything_is_asked_or_written(
    home: Path, command: tuple[str, ...], name: str, said: str
) -> None:
    before = contents(home)
    result = make_cli(NOWHERE, None)(*command, name)
    assert (sentence(result), result.exit_code) == (said, 2)
    assert contents(home) == before


@pytest.fixture
def cli(bench: Bench, database_url: str, redis_url: str) -> Cli:
    return make_cli(database_url, redis_url)


async def test_a_file_in_a_folder_that_is_not_there_is_refused_in_one_sentence(
    cli: Cli, home: Path
) -> None:
    result = await asyncio.to_thread(cli, "audit", "export", "missing/file")
    assert sentence(result) == "The file missing/file cannot be written: No such file or directory."
    assert result.exit_code == 2


@pytest.mark.parametrize(("link", "target"), [("link", "file"), ("dangling", "folder/new")])
async def test_what_is_there_is_replaced_and_a_link_to_it_stays(
    bench: Bench, cli: Cli, home: Path, link: str, target: str
) -> None:
    await change_heroes(bench)
    (home / link).symlink_to(target)
    (home / f"{target}.part").write_text("somebody's own")
    before = contents(home)

    result = await asyncio.to_thread(cli, "audit", "export", link)
    shown = await asyncio.to_thread(cli, "audit", "export")

    assert result.exit_code == 0, result.stderr
    assert (home / link).is_symlink()
    assert (home / target).read_text() == shown.stdout != ""
    assert (home / f"{target}.part").read_text() == "somebody's own"
    assert contents(home).keys() == before.keys() | {target}


def test_of_two_files_written_at_once_under_one_name_the_last_to_end_has_it_whole(
    home: Path,
) -> None:
    before = contents(home)
    with whole_file(Path("wanted")) as first, whole_file(Path("wanted")) as second:
        second.write(b"short")
        first.write(b"much longer")
    assert Path("wanted").read_bytes() == b"much longer"
    assert contents(home).keys() == before.keys() | {"wanted"}


def test_a_file_has_the_rights_of_any_other_new_file(home: Path) -> None:
    with whole_file(Path("written")) as out:
        out.write(b"x")
    Path("opened").touch()
    assert Path("written").stat().st_mode == Path("opened").stat().st_mode


def test_a_file_whose_name_is_taken_by_a_folder_meanwhile_is_told_and_leaves_nothing(
    home: Path,
) -> None:
    before = contents(home)
    with ExitStack() as stack:
        stack.enter_context(whole_file(Path("late"))).write(b"x")
        Path("late").mkdir()
        with pytest.raises(BadInput, match="The file late cannot be written: Is a directory"):
            stack.close()
    assert contents(home).keys() == before.keys() | {"late"}
