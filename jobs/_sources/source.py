"""Where the bytes of an input are stored, and the text that they hold, from any place on."""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from jobs._errors import InputError
from jobs._sources.compression import (
    BLOCK_BYTES,
    HEAD_BYTES,
    Compression,
    compression_of,
    decompressed,
)
from jobs._sources.encoding import UTF8, utf8_blocks

PLACES_SETTING: Final = "BULWARK_IMPORT_FOLDERS"
_OPEN_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_FOLDER_FLAGS: Final = (
    getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
)


class Source(Protocol):
    """An input that can be read any number of times, from any place."""

    def blocks(self, offset: int = 0) -> Iterator[bytes]:
        """The text from `offset` on, in blocks of bounded size."""


class Stored(Protocol):
    """The bytes of an input as they are stored; reading moves no shared position."""

    @property
    def size_bytes(self) -> int:
        """How many there are."""

    def read_at(self, offset: int, most_bytes: int) -> bytes:
        """Some bytes from `offset` on; none at all behind the last."""


def raw_blocks(stored: Stored, offset: int = 0) -> Iterator[bytes]:
    """The bytes as stored, from `offset` on."""
    while block := stored.read_at(offset, BLOCK_BYTES):
        yield block
        offset += len(block)


def stored_compression(stored: Stored) -> Compression:
    """How the input is compressed, by its first bytes."""
    return compression_of(read_fully(stored, 0, HEAD_BYTES))


def read_fully(stored: Stored, offset: int, wanted_bytes: int) -> bytes:
    """So many bytes from `offset` on, fewer only where the input ends."""
    pieces: list[bytes] = []
    while wanted_bytes and (piece := stored.read_at(offset, wanted_bytes)):
        pieces.append(piece)
        offset += len(piece)
        wanted_bytes -= len(piece)
    return b"".join(pieces)


@dataclass(frozen=True)
class Text:
    """The text of a stored input as UTF-8, whatever it is stored as."""

    stored: Stored
    compression: Compression
    encoding: str = UTF8

    @classmethod
    def of(cls, stored: Stored, encoding: str = UTF8) -> "Text":
        return cls(stored, stored_compression(stored), encoding)

    def blocks(self, offset: int = 0) -> Iterator[bytes]:
        """The text from `offset` on; what is packed or transcoded is read from its start."""
        if self.compression == "none" and self.encoding == UTF8:
            return raw_blocks(self.stored, offset)
        return _behind(self.passing(raw_blocks(self.stored)), offset)

    def passing(self, raw: Iterator[bytes]) -> Iterator[bytes]:
        """The text of the stored bytes that pass by."""
        return utf8_blocks(decompressed(raw, self.compression), self.encoding)


def _behind(blocks: Iterator[bytes], offset: int) -> Iterator[bytes]:
    for block in blocks:
        if offset < len(block):
            yield block[offset:]
        offset = max(0, offset - len(block))


class FileSource:
    """A file in one of the allowed folders, held open so that it stays the same file.

    Reading never moves a shared position, so several threads may read at once.
    """

    def __init__(self, path: Path, allowed_folders: Sequence[Path]) -> None:
        self.path = path
        self._fd = _open_file(path, *_resolve(path, allowed_folders))
        self._opened = os.fstat(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.path.name

    @property
    def size_bytes(self) -> int:
        """What it was when the file was opened."""
        return self._opened.st_size

    def read_at(self, offset: int, most_bytes: int) -> bytes:
        """Some bytes from `offset` on; none at all behind the last."""
        return os.pread(self._fd, most_bytes, offset)

    def changed(self) -> bool:
        """Whether the open file was written to, or another file took its place, since the start."""
        now = os.fstat(self._fd)
        opened = self._opened
        if (now.st_size, now.st_mtime_ns) != (opened.st_size, opened.st_mtime_ns):
            return True
        try:
            return not os.path.samestat(self.path.stat(), opened)
        except OSError:
            return True


def _resolve(path: Path, allowed_folders: Sequence[Path]) -> tuple[Path, Path]:
    """The allowed folder that it is in, without a link in its name, and its path from there."""
    try:
        resolved = path.resolve()
        folders = [folder.resolve() for folder in allowed_folders]
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"The input path {path} cannot be followed ({error}); correct it."
        ) from None
    for folder in folders:
        if resolved.is_relative_to(folder):
            return folder, resolved.relative_to(folder)
    raise InputError(
        f"The input file {path} is outside the allowed folders; move it into one of them or"
        f" add its folder to {PLACES_SETTING}."
    )


def _open_file(path: Path, folder: Path, inner: Path) -> int:
    try:
        fd = _open_below(folder, inner.parts)
    except OSError as error:
        raise InputError(
            f"The input file {path} cannot be opened ({error.strerror}); check its name and that"
            " the worker may read it."
        ) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InputError(f"The input {path} is not a regular file; name a file to read.")
    return fd


def _open_below(folder: Path, parts: Sequence[str]) -> int:
    """Open from one folder to the next, so that none that became a link meanwhile leads away."""
    at = os.open(folder, _FOLDER_FLAGS)
    try:
        for part in parts[:-1]:
            inner = os.open(part, _FOLDER_FLAGS, dir_fd=at)
            os.close(at)
            at = inner
        return os.open(parts[-1] if parts else ".", _OPEN_FLAGS, dir_fd=at)
    finally:
        os.close(at)


class PartsSource:
    """An input spooled as numbered parts; part n holds the raw bytes from n * `part_bytes` on.

    `fetch` gives the raw bytes of a part, counted from 0, or None when it is gone. The parts read
    last are kept, since a columnar input is read in several places at once.
    """

    def __init__(
        self,
        fetch: Callable[[int], bytes | None],
        part_bytes: int,
        size_bytes: int,
        kept_parts: int = 1,
    ) -> None:
        self.size_bytes: Final = size_bytes
        self._part_bytes = part_bytes
        self._part = lru_cache(kept_parts)(partial(self._fetched, fetch))

    def read_at(self, offset: int, most_bytes: int) -> bytes:
        """Some bytes from `offset` on; none at all behind the last."""
        if offset >= self.size_bytes:
            return b""
        number, start = divmod(offset, self._part_bytes)
        return self._part(number)[start : start + most_bytes]

    def _fetched(self, fetch: Callable[[int], bytes | None], number: int) -> bytes:
        part = fetch(number)
        if part is None:
            raise InputError(f"Part {number} of the spooled input is gone; enqueue it again.")
        if len(part) != min(self._part_bytes, self.size_bytes - number * self._part_bytes):
            raise InputError(
                f"The spooled input does not fit together at part {number}; enqueue it again."
            )
        return part
