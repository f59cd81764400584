"""Objects of S3, Google Cloud Storage and Azure, read by ranges.

The library behind it takes credentials and endpoints from the usual variables of the environment
(AWS_..., GOOGLE_..., AZURE_...), and is loaded with the first object.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar
from urllib.parse import unquote, urlsplit

from jobs._errors import InputError, SourceAway
from jobs._sources.source import PartsSource

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")
SCHEMES: Final = ("s3", "gs", "az")
RANGE_BYTES: Final = 1024 * 1024
_KEPT_RANGES: Final = 8  # Parquet is read in several places at once
_RETRY: Final[Any] = {"max_retries": 3, "retry_timeout": timedelta(seconds=60)}


class ObjectSource:
    """One version of an object; every read makes sure that it still is that version."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        bucket, self._key = _split(uri)
        self._store = _store(bucket)
        self._version = self._ask(lambda: _head(self._store, self._key))
        self.size_bytes: Final[int] = self._version["size"]
        self._ranges = PartsSource(self._range, RANGE_BYTES, self.size_bytes, _KEPT_RANGES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is held open between reads."""

    @property
    def name(self) -> str:
        """The last part of its key."""
        return self._key.rpartition("/")[2]

    def read_at(self, offset: int, most_bytes: int) -> bytes:
        """Some bytes from `offset` on; none at all behind the last."""
        return self._ranges.read_at(offset, most_bytes)

    def changed(self) -> bool:
        """No: what was read is of one version, and a later one makes the next read fail."""
        return False

    def _range(self, number: int) -> bytes:
        start = number * RANGE_BYTES
        end = min(start + RANGE_BYTES, self.size_bytes)
        return self._ask(lambda: self._get(start, end))

    def _get(self, start: int, end: int) -> bytes:
        import obstore

        found = obstore.get(self._store, self._key, options={"range": (start, end)})
        if _identity(found.meta) != _identity(self._version):
            raise InputError(
                f"The object {self.uri} was changed while the job read it; what was committed "
                "stays, so give the rows behind it to a new job, or to an import with on_conflict "
                "skip all of them."
            )
        return bytes(found.bytes())

    def _ask(self, question: Callable[[], T]) -> T:
        """Ask the store; raises InputError when it refuses, SourceAway when it does not answer."""
        from obstore import exceptions

        refusals = (
            exceptions.PermissionDeniedError,
            exceptions.UnauthenticatedError,
            exceptions.InvalidPathError,
        )
        try:
            return question()
        except FileNotFoundError:
            raise InputError(f"There is no object {self.uri}; correct its name.") from None
        except refusals as error:
            raise InputError(f"The object {self.uri} may not be read: {_said(error)}.") from None
        except exceptions.BaseError as error:
            raise SourceAway(f"The object {self.uri} cannot be read: {_said(error)}.") from None


def _split(uri: str) -> tuple[str, str]:
    """The bucket as a URI of its own, and the key in it."""
    parts = urlsplit(uri)
    key = unquote(parts.path.removeprefix("/"))
    if not parts.netloc or {"", ".", ".."} & set(key.split("/")) or parts.query or parts.fragment:
        raise InputError(f"The URI {uri} names no object; write {parts.scheme}://bucket/key.")
    return f"{parts.scheme}://{parts.netloc}", key


def _store(bucket: str) -> "ObjectStore":
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    try:
        return from_url(bucket, retry_config=_RETRY)
    except (BaseError, ValueError) as error:
        raise InputError(f"The store {bucket} cannot be used: {_said(error)}.") from None


def _head(store: "ObjectStore", key: str) -> Any:
    import obstore

    return obstore.head(store, key)


def _identity(meta: Any) -> tuple[Any, ...]:
    return meta["e_tag"], meta["size"], meta["last_modified"], meta["version"]


def _said(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
