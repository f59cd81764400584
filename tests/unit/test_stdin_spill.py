"""What comes through stdin is kept in a file for a while, and nothing of it stays."""

import fcntl
import io
import resource
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from worker.exit_codes import BadInput
from worker.import_file import import_file

ROOM_BYTES = 100_000


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def little_room() -> Iterator[None]:
    """No file may become larger, as on a disk that is full."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM_BYTES, usual[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    signal.signal(signal.SIGXFSZ, handler)


def kept(data: bytes) -> bytes:
    with import_file("-", io.BytesIO(data), in_place=False) as (path, uri):
        assert uri is None
        return path.read_bytes()


def test_it_is_there_as_long_as_it_is_needed(scratch: Path) -> None:
    assert kept(b"name\nRed\n") == b"name\nRed\n"
    assert list(scratch.iterdir()) == []


@pytest.mark.usefixtures("little_room")
def test_a_full_disk_is_told_in_one_sentence_and_leaves_nothing(scratch: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot be kept in .*File too large; set TMPDIR to"):
        kept(bytes(2 * ROOM_BYTES))
    assert list(scratch.iterdir()) == []


def test_an_input_that_breaks_off_is_no_full_disk_and_leaves_nothing(scratch: Path) -> None:
    with Path("/proc/self/mem").open("rb", buffering=0) as unreadable:
        spilled = import_file("-", cast("BinaryIO", unreadable), in_place=False)
        with pytest.raises(OSError, match="Input/output error"):
            spilled.__enter__()
    assert list(scratch.iterdir()) == []


def test_what_a_killed_process_has_left_goes_and_what_another_uses_stays(scratch: Path) -> None:
    for name in ("left", "used"):
        (scratch / f"bulwark-stdin-{name}").mkdir()
        (scratch / f"bulwark-stdin-{name}" / "stdin").write_bytes(b"x")
    with (scratch / "bulwark-stdin-used" / "stdin").open("rb") as used:
        fcntl.flock(used, fcntl.LOCK_EX)
        kept(b"name\n")
    assert [path.name for path in scratch.iterdir()] == ["bulwark-stdin-used"]
