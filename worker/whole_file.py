"""A file that is there whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from worker.exit_codes import BadInput, has_no_room


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when the block ends well; otherwise nothing of it is left.

    Raises BadInput when it cannot be opened, and when there is no room for it.
    """
    unfinished = path.with_name(f"{path.name}.part")
    try:
        out = unfinished.open("wb")
    except OSError as error:
        raise _unwritable(unfinished, error) from None
    try:
        with out:
            yield out
        unfinished.replace(path)
    except OSError as error:
        if has_no_room(error):
            raise _unwritable(unfinished, error) from None
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> BadInput:
    return BadInput(f"The file {path} cannot be written: {error.strerror}.")
