"""Where archives are: a folder, or the beginning of the names of objects in a store."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from jobs._errors import InputError, TryLater
from jobs._sources.object_store import SCHEMES
from jobs._sources.place import ImportPlace, is_uri, path_of

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")
PLACES_SETTING: Final = "BULWARK_ARCHIVE_FOLDERS"
AWAY_DELAY: Final = timedelta(seconds=60)
_PART: Final = ".part"
_RETRY: Final[Any] = {"max_retries": 3, "retry_timeout": timedelta(seconds=60)}


class ArchivePlace(Protocol):
    """Named pieces of an archive; what is written replaces what has the name, at once and whole."""

    def write(self, name: str, data: bytes) -> None: ...

    def read(self, name: str) -> bytes: ...

    def names(self) -> list[str]: ...

    def remove(self, name: str) -> None: ...


def open_archive(place: str, allowed: Sequence[ImportPlace]) -> ArchivePlace:
    """An archive by its folder or URI; it need not be there yet. It blocks: to be used in a thread.

    Raises InputError when it is outside the allowed places; what it does raises InputError where
    there is nothing, and TryLater where the place does not answer.
    """
    if is_uri(place):
        return ObjectPlace(place, allowed)
    return FolderPlace(Path(path_of(place)), allowed)


def below(place: str, name: str) -> str:
    """A folder in a place."""
    return f"{place.rstrip('/')}/{name}"


def _outside(place: object) -> InputError:
    return InputError(
        f"The archive {place} is outside the allowed places; add its folder, or its bucket or a "
        f"folder of it, to {PLACES_SETTING}."
    )


class FolderPlace:
    """A folder; each piece is a file that takes its name when it is complete and on the disk."""

    def __init__(self, path: Path, allowed: Sequence[ImportPlace]) -> None:
        folders = [folder for folder in allowed if isinstance(folder, Path)]
        resolved = path.resolve()
        if not any(resolved.is_relative_to(folder.resolve()) for folder in folders):
            raise _outside(path)
        self._path = resolved

    def write(self, name: str, data: bytes) -> None:
        part = self._path / f".{name}{_PART}"

        def put() -> None:
            self._path.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            part.replace(self._path / name)
            self._keep_names()

        self._do(put, "written")

    def read(self, name: str) -> bytes:
        return self._do((self._path / name).read_bytes, "read")

    def names(self) -> list[str]:
        return self._do(lambda: sorted(one.name for one in self._path.iterdir()), "listed")

    def remove(self, name: str) -> None:
        self._do(lambda: (self._path / name).unlink(missing_ok=True), "removed")

    def _keep_names(self) -> None:
        """Have the folder itself on the disk."""
        folder = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _do(self, work: Callable[[], T], what: str) -> T:
        try:
            return work()
        except FileNotFoundError as error:
            raise InputError(f"There is no archive {error.filename}; correct its name.") from None
        except OSError as error:
            text = f"The archive {self._path} cannot be {what}: {error.strerror}."
            raise TryLater(AWAY_DELAY, text) from None


class ObjectPlace:
    """The beginning of the names of objects; credentials come from the environment."""

    def __init__(self, uri: str, allowed: Sequence[ImportPlace]) -> None:
        if uri.partition("://")[0] not in SCHEMES:
            raise InputError(f"The archive {uri} is neither a folder nor in {', '.join(SCHEMES)}.")
        prefixes = [place.rstrip("/") + "/" for place in allowed if isinstance(place, str)]
        if ".." in uri.split("/") or not f"{uri}/".startswith(tuple(prefixes)):
            raise _outside(uri)
        self._uri = uri

    def write(self, name: str, data: bytes) -> None:
        import obstore

        self._ask(lambda: obstore.put(self._store(), name, data), "written")

    def read(self, name: str) -> bytes:
        import obstore

        return self._ask(lambda: bytes(obstore.get(self._store(), name).bytes()), "read")

    def names(self) -> list[str]:
        import obstore

        def found() -> list[str]:
            pages = obstore.list(self._store())
            return [meta["path"].rpartition("/")[2] for page in pages for meta in page]

        return self._ask(found, "listed")

    def remove(self, name: str) -> None:
        import obstore

        self._ask(lambda: obstore.delete(self._store(), name), "removed")

    def _store(self) -> "ObjectStore":
        from obstore.store import from_url

        return from_url(self._uri, retry_config=_RETRY)

    def _ask(self, question: Callable[[], T], what: str) -> T:
        from obstore import exceptions

        try:
            return question()
        except FileNotFoundError:
            raise InputError(f"There is no archive {self._uri}; correct its name.") from None
        except (exceptions.BaseError, ValueError, OSError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            text = f"The archive {self._uri} cannot be {what}: {said}."
            raise TryLater(AWAY_DELAY, text) from None
