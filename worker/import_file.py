"""What the command line names as the input of an import: a file, stdin, or an object by its URI."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, BinaryIO

from pydantic import ValidationError

from jobs._sources.format import Shape
from jobs._sources.place import is_uri, path_of
from worker.exit_codes import BadInput, first_problem

STDIN = "-"
COPY_BYTES = 1024 * 1024
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PREFIX, _NAME = "bulwark-stdin-", "stdin"


def declared_shape(format_: str | None, encoding: str | None, delimiter: str | None) -> Shape:
    """What the options say about the input; `\\t` is a tab. Raises BadInput."""
    given: dict[str, Any] = {
        "format": format_,
        "encoding": encoding,
        "delimiter": delimiter and delimiter.replace("\\t", "\t"),
    }
    try:
        return Shape(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise BadInput(first_problem(error)) from None


def stays_in_place(*, in_place: bool, spool: bool) -> bool | None:
    """Whether the worker is to read the input where it is; None if nothing is said."""
    if in_place and spool:
        raise BadInput("--in-place and --spool contradict each other: leave one out.")
    return in_place or (False if spool else None)


@contextmanager
def import_file(
    named: str, stdin: BinaryIO, *, in_place: bool
) -> Iterator[tuple[Path, str | None]]:
    """The file that was named, and the URI if it is an object. Raises BadInput, InputError."""
    if named == STDIN:
        if in_place:
            raise BadInput("stdin cannot be read in place: leave --in-place out.")
        with _spilled(stdin) as path:
            yield path, None
    elif is_uri(named):
        yield Path(named.rpartition("/")[2]), named
    else:
        yield Path(path_of(named)), None


@contextmanager
def _spilled(stream: BinaryIO) -> Iterator[Path]:
    """What can be read only once, as a file for as long as it is needed.

    Whatever breaks off the stream leaves no job, for none is enqueued before its end.
    """
    _sweep(Path(gettempdir()))
    with TemporaryDirectory(prefix=_PREFIX) as folder:
        unlocked, path = Path(folder, "unlocked"), Path(folder, _NAME)
        with unlocked.open("wb") as file:
            flock(file, LOCK_EX)
            unlocked.rename(path)
            try:
                shutil.copyfileobj(stream, file, COPY_BYTES)
                file.flush()
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                raise BadInput(
                    f"What comes through stdin cannot be kept in {folder}: {error.strerror}; "
                    "set TMPDIR to a folder with more room, or import a file."
                ) from None
            yield path


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed have left: a file that is in use is locked."""
    for path in folder.glob(f"{_PREFIX}*/{_NAME}"):
        with suppress(OSError), path.open("rb") as file:
            flock(file, LOCK_EX | LOCK_NB)
            shutil.rmtree(path.parent)
