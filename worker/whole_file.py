"""A file that is there whole or not at all."""

import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from worker.exit_codes import BadInput, has_no_room


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when the block ends well; otherwise nothing of it is left.

    Of several that are written at once under one name the last to end has it. Raises BadInput when
    it cannot be one, be opened or take its name, and when there is no room.
    """
    place = require_file(path)
    unfinished = place.with_name(f".bulwark-{secrets.token_hex(8)}.part")
    try:
        out = unfinished.open("xb")
    except OSError as error:
        raise _unwritable(place, error) from None
    try:
        with out:
            yield out
        _name(unfinished, place)
    except OSError as error:
        if has_no_room(error):
            raise _unwritable(place, error) from None
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def require_file(name: str | Path) -> Path:
    """Where the file is to be: behind a link, where the link leads.

    Raises BadInput where nothing, or something else than a file, has the name: a file that is
    written beside it and then takes its name would stand in the place of a device or a pipe.
    """
    path = Path(name)
    if not path.name:
        raise _no_name(name)
    try:
        mode = _mode(path)
        place = path.resolve() if path.is_symlink() else path
    except OSError as error:
        raise _unwritable(path, error) from None
    except ValueError:  # a NUL, or half a pair
        raise _no_name(name) from None
    _require_regular(path, mode)
    return place


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _require_regular(path: Path, mode: int | None) -> None:
    if mode is None or stat.S_ISREG(mode):
        return
    if stat.S_ISDIR(mode):
        raise BadInput(f"{path} is a folder; name a file in it, or give - for stdout.")
    raise BadInput(f"{path} is no regular file; - writes to stdout, which may be any pipe.")


def _name(unfinished: Path, place: Path) -> None:
    try:
        unfinished.replace(place)
    except OSError as error:
        raise _unwritable(place, error) from None


def _no_name(name: str | Path) -> BadInput:
    return BadInput(f"{str(name)!r} is no name of a file; - writes to stdout.")


def _unwritable(path: Path, error: OSError) -> BadInput:
    return BadInput(f"The file {path} cannot be written: {error.strerror}.")
