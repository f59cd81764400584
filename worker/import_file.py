"""What the command line names as the input of an import: a file, stdin, or an object by its URI."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from pydantic import ValidationError

from jobs._sources.format import Shape
from jobs._sources.place import is_uri, path_of
from worker.exit_codes import BadInput, first_problem

STDIN = "-"
COPY_BYTES = 1024 * 1024


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
    with TemporaryDirectory(prefix="bulwark-") as folder:
        path = Path(folder) / "stdin"
        with path.open("wb") as file:
            shutil.copyfileobj(stream, file, COPY_BYTES)
        yield path
