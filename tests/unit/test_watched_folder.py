"""A file on its way through a watched folder: taken by one, and never lost or written over."""

import os
from contextlib import ExitStack, closing
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from tests.deep_folder import LONG_NAME, deep_folder
from worker.watched_folder import (
    ACCEPTED,
    FAILED,
    TAKEN,
    FolderAway,
    NotTaken,
    Taken,
    WatchedFolder,
)


@pytest.fixture
def folder(tmp_path: Path) -> WatchedFolder:
    watched = WatchedFolder(tmp_path)
    watched.prepare()
    return watched


def drop(folder: WatchedFolder, name: str, text: str = "name\nRed\n") -> Path:
    path = folder.path / name
    path.write_text(text)
    return path


def take(folder: WatchedFolder, name: str, job_id: UUID | None = None) -> Taken:
    """Take a file and let go of it, as a crash would."""
    with folder.take(name, job_id or uuid4()) as taken:
        assert taken is not None
    return taken


def left(folder: WatchedFolder) -> list[Taken]:
    return list(folder.left())


def test_a_file_is_settled_when_two_looks_find_it_the_same(folder: WatchedFolder) -> None:
    drop(folder, "a.csv")

    assert folder.settled() == []
    assert folder.settled() == ["a.csv"]


def test_a_file_that_grows_is_not_settled_until_it_rests(folder: WatchedFolder) -> None:
    path = drop(folder, "a.csv")
    folder.settled()
    with path.open("a") as file:
        file.write("Blue\n")

    assert folder.settled() == []
    assert folder.settled() == ["a.csv"]


def test_a_file_that_another_takes_the_place_of_is_not_settled(folder: WatchedFolder) -> None:
    first = drop(folder, "a.csv")
    was = first.stat()
    folder.settled()
    twin = drop(folder, "b.part")
    os.utime(twin, ns=(was.st_atime_ns, was.st_mtime_ns))
    twin.rename(first)

    assert folder.settled() == []


@pytest.mark.parametrize(
    "name", [".a.csv", "a.csv.tmp", "a.csv.part", "A.CSV.PART", "a.csv.filepart", "a.csv~"]
)
def test_a_file_under_a_name_for_unfinished_ones_is_left_alone(
    folder: WatchedFolder, name: str
) -> None:
    drop(folder, name)
    folder.settled()

    assert folder.settled() == []


def test_empty_files_folders_and_links_are_left_alone(folder: WatchedFolder) -> None:
    drop(folder, "empty.csv", "")
    (folder.path / "folder.csv").mkdir()
    (folder.path / "link.csv").symlink_to(folder.path / "empty.csv")
    folder.settled()

    assert folder.settled() == []


def test_the_oldest_comes_first(folder: WatchedFolder) -> None:
    for second, name in enumerate(("c", "a", "b")):
        os.utime(drop(folder, name), (second, second))
    folder.settled()

    assert folder.settled() == ["c", "a", "b"]


def test_one_of_two_takes_a_file(folder: WatchedFolder) -> None:
    drop(folder, "a.csv")
    with ExitStack() as both:
        mine = both.enter_context(folder.take("a.csv", uuid4()))
        other = both.enter_context(WatchedFolder(folder.path).take("a.csv", uuid4()))

        assert mine is not None
        assert mine.path.read_text() == "name\nRed\n"
        assert other is None
    assert [one.name for one in (folder.path / TAKEN).iterdir()] == [str(mine.job_id)]


def test_a_file_that_somebody_is_at_work_on_is_not_left(folder: WatchedFolder) -> None:
    drop(folder, "a.csv")
    other = WatchedFolder(folder.path)
    with folder.take("a.csv", uuid4()):
        assert left(other) == []

    assert len(left(other)) == 1


def test_what_was_left_is_held_by_the_one_that_found_it(folder: WatchedFolder) -> None:
    drop(folder, "a.csv")
    was = take(folder, "a.csv")
    with closing(folder.left()) as mine:
        assert next(mine) == was
        assert left(WatchedFolder(folder.path)) == []

    assert left(folder) == [was]


def test_a_folder_that_was_made_for_nothing_is_removed(folder: WatchedFolder) -> None:
    (folder.path / TAKEN / str(uuid4())).mkdir()
    (folder.path / TAKEN / "not of ours").mkdir()

    assert left(folder) == []
    assert [one.name for one in (folder.path / TAKEN).iterdir()] == ["not of ours"]


def test_files_of_one_name_stand_side_by_side(folder: WatchedFolder) -> None:
    for text in ("1", "2", "3"):
        drop(folder, "a.csv.gz", text)
        folder.accept(take(folder, "a.csv.gz"))

    accepted = {one.name: one.read_text() for one in (folder.path / ACCEPTED).iterdir()}
    assert accepted == {"a.csv.gz": "1", "a.csv.2.gz": "2", "a.csv.3.gz": "3"}
    assert left(folder) == []


def test_a_file_that_fails_has_its_reason_beside_it(folder: WatchedFolder) -> None:
    drop(folder, "a.csv")
    folder.fail(take(folder, "a.csv"), "It is wrong.")

    failed = {one.name: one.read_text() for one in (folder.path / FAILED).iterdir()}
    assert failed == {"a.csv": "name\nRed\n", "a.csv.reason": "It is wrong.\n"}


def test_a_file_that_alone_cannot_be_moved_is_not_taken_and_stays(tmp_path: Path) -> None:
    folder = WatchedFolder(deep_folder(tmp_path))
    folder.prepare()
    path = drop(folder, LONG_NAME)
    with pytest.raises(NotTaken, match="cannot be moved: File name too long"):
        take(folder, path.name)

    assert path.exists()
    assert list((folder.path / TAKEN).iterdir()) == []
    assert take(folder, drop(folder, "b.csv").name).name == "b.csv"


def test_what_another_has_moved_meanwhile_leaves_no_trace(folder: WatchedFolder) -> None:
    drop(folder, "a.csv")
    taken = take(folder, "a.csv")
    folder.accept(taken)
    folder.accept(taken)
    folder.fail(taken, "gone")

    assert [one.name for one in (folder.path / ACCEPTED).iterdir()] == ["a.csv"]
    assert list((folder.path / FAILED).iterdir()) == []


def test_the_longest_name_that_there_is_can_fail_twice(folder: WatchedFolder) -> None:
    name = "ä" * 125 + ".csv"
    for _ in range(2):
        drop(folder, name)
        folder.fail(take(folder, name), "It is wrong.")

    names = sorted(one.name for one in (folder.path / FAILED).iterdir())
    first, second = (one for one in names if one.endswith(".csv"))
    assert names == sorted([first, second, f"{first}.reason", f"{second}.reason"])


def test_a_name_that_is_no_text_can_be_told(folder: WatchedFolder) -> None:
    name = os.fsdecode(b"caf\xe9.csv")
    drop(folder, name)

    assert take(folder, name).name == "caf\N{REPLACEMENT CHARACTER}.csv"


def test_a_folder_that_is_gone_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FolderAway, match=r"cannot be used: .*No such file"):
        WatchedFolder(tmp_path / "nowhere").settled()
