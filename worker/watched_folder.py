"""A folder into which files arrive, and the way of each through it: taken, then accepted or failed.

A file is taken by renaming it to `taken/JOB/NAME`, which one watcher of many can do. JOB is the id
that its job will have, so whoever finds the file there after a crash makes the same job and no
other. A lock on that folder, which ends with its process, says that somebody is at work on it.
"""

import fcntl
import os
import stat
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Final, NamedTuple
from uuid import UUID

from worker.exit_codes import BadInput

TAKEN: Final = "taken"
ACCEPTED: Final = "accepted"
FAILED: Final = "failed"
REASON: Final = ".reason"
_NAME_BYTES: Final = 255 - len(REASON)
UNFINISHED: Final = (".tmp", ".temp", ".part", ".partial", ".filepart", ".crdownload", "~")
"""How names of files end that are still being written."""


class FolderAway(BadInput):
    """A watched folder cannot be used, for now or at all."""


class NotTaken(BadInput):
    """One file cannot be moved, for now or at all; it stays where it is."""


class Look(NamedTuple):
    """What a file looked like; one that is written to does not look the same for long."""

    inode: int
    size_bytes: int
    changed_ns: int


@dataclass(frozen=True)
class Taken:
    """A file that was taken, to become the job of this id."""

    job_id: UUID
    path: Path

    @property
    def name(self) -> str:
        return readable(self.path.name)


def readable(name: str) -> str:
    """A file's name, also where it is no valid text."""
    return os.fsencode(name).decode(errors="replace")


class WatchedFolder:
    """The files of one folder; several processes may watch it at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._looks: dict[str, Look] = {}

    def prepare(self) -> None:
        """Make the folders for what was taken, accepted and failed."""
        with _using(self.path):
            for name in (TAKEN, ACCEPTED, FAILED):
                (self.path / name).mkdir(exist_ok=True)

    def settled(self) -> list[str]:
        """The files that look as they did the last time that this was asked, the oldest first."""
        with _using(self.path):
            before, self._looks = self._looks, dict(self._arrivals())
        same = [name for name, look in self._looks.items() if before.get(name) == look]
        return sorted(same, key=lambda name: (self._looks[name].changed_ns, name))

    def _arrivals(self) -> Iterator[tuple[str, Look]]:
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name.lower().endswith(UNFINISHED):
                    continue
                with suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(found.st_mode) and found.st_size:
                        look = Look(found.st_ino, found.st_size, found.st_mtime_ns)
                        yield entry.name, look

    @contextmanager
    def take(self, name: str, job_id: UUID) -> Iterator[Taken | None]:
        """Take a file and hold it; None when another watcher was faster.

        Raises NotTaken when only this file cannot be moved: in a sticky folder, that of others.
        """
        home = self.path / TAKEN / str(job_id)
        with _using(self.path):
            home.mkdir()
        with _held(home):
            try:
                yield self._move_home(Taken(job_id, home / name))
            finally:
                _remove_if_empty(home)

    def _move_home(self, taken: Taken) -> Taken | None:
        refusal = None
        try:
            (self.path / taken.path.name).rename(taken.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            refusal = error.strerror
        if _files(taken.path.parent):  # over a network a rename that was done may be told as failed
            return taken
        if refusal is not None:
            raise NotTaken(f"The file cannot be moved: {refusal}.")
        return None

    def left(self) -> Generator[Taken]:
        """Files that were taken and that nobody is at work on; each is held while it is out."""
        with _using(self.path):
            homes = sorted((self.path / TAKEN).iterdir())
        for home, job_id in ((home, _job_id(home.name)) for home in homes):
            if job_id is None:
                continue
            with _held(home) as free:
                for path in _files(home) if free else ():
                    yield Taken(job_id, path)
                if free:
                    _remove_if_empty(home)

    def accept(self, taken: Taken) -> None:
        """Put the file among those whose jobs are accepted, unless somebody has done it."""
        with _using(self.path), suppress(FileNotFoundError):
            _move(taken.path, self.path / ACCEPTED)

    def fail(self, taken: Taken, reason: str) -> None:
        """Put the file aside, the reason beside it."""
        with _using(self.path), suppress(FileNotFoundError):
            place = _move(taken.path, self.path / FAILED)
            place.with_name(place.name + REASON).write_text(f"{reason}\n", encoding="utf-8")


@contextmanager
def _using(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FolderAway(f"The folder {path} cannot be used: {error}.") from None


def _files(home: Path) -> list[Path]:
    with suppress(FileNotFoundError):
        return list(home.iterdir())
    return []


def _job_id(name: str) -> UUID | None:
    try:
        return UUID(name)
    except ValueError:
        return None


@contextmanager
def _held(home: Path) -> Iterator[bool]:
    """Hold the folder until the end, or tell that somebody else does.

    Where locks do not work everyone holds it: then two may do the same work, which makes one job.
    """
    try:
        handle = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except BlockingIOError:
        free = False
    except OSError:
        free = True
    try:
        yield free
    finally:
        os.close(handle)


def _move(path: Path, folder: Path) -> Path:
    """Move a file into the folder, under a name that nothing there has."""
    place = next(one for one in _names(folder / path.name) if _reserve(one))
    try:
        path.replace(place)
    except FileNotFoundError:
        place.unlink()
        raise
    return place


def _names(wanted: Path) -> Iterator[Path]:
    """The wanted name and others like it; all leave room for the ending of the reason's name."""
    stem = os.fsencode(wanted.stem)
    for ending in chain([wanted.suffix], (f".{number}{wanted.suffix}" for number in count(2))):
        room = max(0, _NAME_BYTES - len(os.fsencode(ending)))
        yield wanted.with_name(os.fsdecode(stem[:room]) + ending)


def _reserve(place: Path) -> bool:
    try:
        os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return False
    return True


def _remove_if_empty(home: Path) -> None:
    with suppress(OSError):
        home.rmdir()
