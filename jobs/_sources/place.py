"""Opening an input by its path or URI, where that is allowed."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from jobs._errors import InputError
from jobs._sources.object_store import SCHEMES, ObjectSource
from jobs._sources.source import PLACES_SETTING, FileSource

ImportPlace = Path | str
"""A folder, or the beginning of the URIs of objects."""

_FILE: Final = "file"
_NOT_UTF8: Final = re.compile("[\ud800-\udfff]")


def is_uri(place: str) -> bool:
    """Whether it names an object in a store; a URI of a file is no more than its path."""
    return "://" in place and not place.startswith(f"{_FILE}://")


def printable(name: str) -> str:
    """The name of a file as text that can be stored: what in it is not UTF-8 is replaced."""
    return _NOT_UTF8.sub("\ufffd", name)


def open_place(
    place: str, allowed: Sequence[ImportPlace] | None = None
) -> FileSource | ObjectSource:
    """Open a file or an object; anywhere, unless it is said where.

    Raises InputError when it is elsewhere, not there, or not to be read.
    """
    if is_uri(place):
        return _open_object(place, allowed)
    path = Path(path_of(place))
    if allowed is None:
        return FileSource(path, [path.resolve().parent])
    return FileSource(path, [folder for folder in allowed if isinstance(folder, Path)])


def path_of(place: str) -> str:
    """The path of a file that is named by one, or by its URI. Raises InputError."""
    if "://" not in place:
        return place
    parts = urlsplit(place)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise InputError(f"The URI {place} names no file of this machine; write file:///path.")
    return unquote(parts.path)


def _open_object(uri: str, allowed: Sequence[ImportPlace] | None) -> ObjectSource:
    scheme = uri.partition("://")[0]
    if scheme not in SCHEMES:
        known = ", ".join((_FILE, *SCHEMES))
        raise InputError(f"The URI {uri} has the scheme {scheme!r}, and known are {known}.")
    if allowed is not None and not any(_within(uri, one) for one in allowed):
        raise InputError(
            f"The object {uri} is outside the allowed places; add its bucket, or a folder of it,"
            f" to {PLACES_SETTING}."
        )
    return ObjectSource(uri)


def _within(uri: str, place: ImportPlace) -> bool:
    return isinstance(place, str) and uri.startswith(place.rstrip("/") + "/")
