"""Where input bytes come from: files and spooled parts, compressed or not, as one stream."""

import hashlib
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, NamedTuple, Protocol, Self

from jobs._errors import InputError

BLOCK_BYTES: Final = 256 * 1024

Compression = Literal["none", "gzip"]

_GZIP_MAGIC: Final = b"\x1f\x8b"
_GZIP_WBITS: Final = 31
_STEP_BYTES: Final = 16 * 1024  # zlib hands back what a short member leaves over: copy little
_FOLDERS_SETTING: Final = "BULWARK_IMPORT_FOLDERS"
_OPEN_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Source(Protocol):
    """An input that can be read any number of times, from any place."""

    def blocks(self, offset: int = 0) -> Iterator[bytes]:
        """The uncompressed bytes from `offset` on, in blocks of bounded size."""


class StoredSource(Source, Protocol):
    """A source that also gives its bytes as they are stored, which is what a fingerprint covers."""

    def raw_blocks(self) -> Iterator[bytes]:
        """The bytes as stored, compressed or not, from the first on."""


class Inspection(NamedTuple):
    """What one full pass found out: the fingerprint covers the bytes as stored."""

    sha256: str
    raw_bytes: int
    text_bytes: int
    compression: Compression


def compression_of(head: bytes) -> Compression:
    """Tell from the first two bytes how an input is stored; its name says nothing."""
    return "gzip" if head.startswith(_GZIP_MAGIC) else "none"


class Gunzip:
    """Incremental decompression of one or more gzip members, in bounded memory.

    Damage, an early end and bytes that belong to no member raise InputError with their place.
    """

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(_GZIP_WBITS)
        self._read_bytes = 0
        self._member_start = 0

    def feed(self, raw: bytes) -> Iterator[bytes]:
        """The text that these bytes complete; to be iterated to its end before the next call."""
        for at in range(0, len(raw), _STEP_BYTES):
            rest = raw[at : at + _STEP_BYTES]
            while rest:
                text, rest = self._step(rest)
                if text:
                    yield text

    def finish(self) -> None:
        """Raise InputError when the last member is not complete."""
        if not self._decoder.eof:
            raise InputError(
                f"The gzip input is cut off: it ends at byte {self._read_bytes}, within its"
                " compressed data; send the whole file again."
            )

    def _step(self, raw: bytes) -> tuple[bytes, bytes]:
        if self._decoder.eof:
            self._decoder = zlib.decompressobj(_GZIP_WBITS)
            self._member_start = self._read_bytes
        before = self._decoder.copy()
        try:
            text = self._decoder.decompress(raw, BLOCK_BYTES)
        except zlib.error:
            raise self._damage(before, raw) from None
        rest = self._decoder.unused_data or self._decoder.unconsumed_tail
        self._read_bytes += len(raw) - len(rest)
        return text, rest

    def _damage(self, before: "zlib._Decompress", raw: bytes) -> InputError:
        at = self._read_bytes + _first_bad_byte(before, raw)
        if self._member_start and at < self._member_start + len(_GZIP_MAGIC):
            return InputError(
                f"The gzip input has other bytes behind its compressed data, from byte"
                f" {self._member_start} on; remove them or compress the file again."
            )
        return InputError(
            f"The gzip input is damaged at byte {at}; compress the file again and send it anew."
        )


def _first_bad_byte(decoder: "zlib._Decompress", raw: bytes) -> int:
    for at in range(len(raw)):
        try:
            decoder.decompress(raw[at : at + 1])
        except zlib.error:
            return at
    return len(raw)


class Inspector:
    """Fingerprints and verifies an input while it passes by, block by block."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._raw_bytes = 0
        self._text_bytes = 0
        self._head = b""
        self._gunzip: Gunzip | None = None

    def feed(self, block: bytes) -> None:
        """Take the next raw bytes; raises InputError as soon as a gzip input shows damage."""
        self._sha256.update(block)
        first = self._raw_bytes < len(_GZIP_MAGIC)
        self._raw_bytes += len(block)
        if first:
            block = self._recognise(block)
        if self._gunzip is None:
            self._text_bytes += len(block)
        else:
            self._text_bytes += sum(map(len, self._gunzip.feed(block)))

    def finish(self) -> Inspection:
        """The result; raises InputError when the input is empty or a gzip input is cut off."""
        if self._gunzip is not None:
            self._gunzip.finish()
        text_bytes = self._text_bytes + len(self._head)
        if not text_bytes:
            raise InputError("The input is empty (0 bytes); send a file with a header and rows.")
        compression: Compression = "none" if self._gunzip is None else "gzip"
        return Inspection(self._sha256.hexdigest(), self._raw_bytes, text_bytes, compression)

    def _recognise(self, block: bytes) -> bytes:
        head = self._head + block
        if len(head) < len(_GZIP_MAGIC):
            self._head = head
            return b""
        self._head = b""
        if compression_of(head) == "gzip":
            self._gunzip = Gunzip()
        return head


def inspect(source: StoredSource) -> Inspection:
    """Read the whole input once, before any row is used, so that damage is found with nothing done.

    Raises InputError when the input is empty, damaged or cut off.
    """
    inspector = Inspector()
    for block in source.raw_blocks():
        inspector.feed(block)
    return inspector.finish()


def text_from(raw_blocks: Iterable[bytes], offset: int) -> Iterator[bytes]:
    """Decompress a gzip stream and leave out its first `offset` bytes of text."""
    for block in _gunzipped(raw_blocks):
        if offset < len(block):
            yield block[offset:]
        offset = max(0, offset - len(block))


def _gunzipped(raw_blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The text in blocks of useful size, even if the input has a member for every byte."""
    gunzip = Gunzip()
    held: list[bytes] = []
    held_bytes = 0
    for text in chain.from_iterable(map(gunzip.feed, raw_blocks)):
        held.append(text)
        held_bytes += len(text)
        if held_bytes >= BLOCK_BYTES:
            yield b"".join(held)
            held, held_bytes = [], 0
    yield b"".join(held)
    gunzip.finish()


class FileSource:
    """A file in one of the allowed folders, held open so that it stays the same file.

    Reading never moves a shared position, so several threads may read at once.
    """

    def __init__(self, path: Path, allowed_folders: Sequence[Path]) -> None:
        self.path = path
        self._fd = _open_file(path, _resolve(path, allowed_folders))
        self._opened = os.fstat(self._fd)
        self.compression: Final = compression_of(os.pread(self._fd, len(_GZIP_MAGIC), 0))

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

    def blocks(self, offset: int = 0) -> Iterator[bytes]:
        """The uncompressed bytes from `offset` on; a gzip file is decompressed from its start."""
        if self.compression == "gzip":
            return text_from(self._read(0), offset)
        return self._read(offset)

    def raw_blocks(self) -> Iterator[bytes]:
        """The bytes as stored, from the first on."""
        return self._read(0)

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

    def _read(self, offset: int) -> Iterator[bytes]:
        while block := os.pread(self._fd, BLOCK_BYTES, offset):
            yield block
            offset += len(block)


def _resolve(path: Path, allowed_folders: Sequence[Path]) -> Path:
    try:
        resolved = path.resolve()
        allowed = any(resolved.is_relative_to(folder.resolve()) for folder in allowed_folders)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"The input path {path} cannot be followed ({error}); correct it."
        ) from None
    if not allowed:
        raise InputError(
            f"The input file {path} is outside the allowed folders; move it into one of them or"
            f" add its folder to {_FOLDERS_SETTING}."
        )
    return resolved


def _open_file(path: Path, resolved: Path) -> int:
    try:
        fd = os.open(resolved, _OPEN_FLAGS)
    except OSError as error:
        raise InputError(
            f"The input file {path} cannot be opened ({error.strerror}); check its name and that"
            " the worker may read it."
        ) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InputError(f"The input {path} is not a regular file; name a file to read.")
    return fd


class PartsSource:
    """An input spooled as numbered parts; part n holds the raw bytes from n * `part_bytes` on.

    `fetch` gives the raw bytes of a part, counted from 0, or None behind the last one.
    """

    def __init__(
        self, fetch: Callable[[int], bytes | None], part_bytes: int, compression: Compression
    ) -> None:
        self._fetch = fetch
        self._part_bytes = part_bytes
        self.compression: Final = compression

    def blocks(self, offset: int = 0) -> Iterator[bytes]:
        """The uncompressed bytes from `offset` on; plain input starts at the part that holds it."""
        if self.compression == "gzip":
            return text_from(self._read(0), offset)
        return self._read(offset)

    def raw_blocks(self) -> Iterator[bytes]:
        """The bytes as stored, from the first on."""
        return self._read(0)

    def _read(self, offset: int) -> Iterator[bytes]:
        number, start = divmod(offset, self._part_bytes)
        for part in self._parts(number):
            for at in range(start, len(part), BLOCK_BYTES):
                yield part[at : at + BLOCK_BYTES]
            start = 0

    def _parts(self, number: int) -> Iterator[bytes]:
        complete = True
        while (part := self._fetch(number)) is not None:
            if not complete or len(part) > self._part_bytes:
                raise InputError(
                    f"The spooled input does not fit together at part {number}; enqueue it again."
                )
            complete = len(part) == self._part_bytes
            yield part
            number += 1
