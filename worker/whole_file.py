"""A file that is there whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from worker.exit_codes import BadInput


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when the block ends well; otherwise nothing of it is left.

    Raises BadInput when it cannot be opened.
    """
    unfinished = path.with_name(f"{path.name}.part")
    try:
        out = unfinished.open("wb")
    except OSError as error:
        raise BadInput(f"The file {unfinished} cannot be written: {error.strerror}.") from None
    try:
        with out:
            yield out
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
