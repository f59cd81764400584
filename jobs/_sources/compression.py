"""Decompression of gzip and zstd as streams: any number of members, in bounded memory.

Damage, an early end and bytes that belong to no member raise InputError with their place.
"""

import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Final, Literal, NamedTuple

from backports.zstd import DecompressionParameter, ZstdDecompressor, ZstdError

from jobs._errors import InputError

BLOCK_BYTES: Final = 256 * 1024

Compression = Literal["none", "gzip", "zstd"]

_GZIP_MAGIC: Final = b"\x1f\x8b"
_GZIP_WBITS: Final = 31
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE: Final = tuple(bytes([n, 0x2A, 0x4D, 0x18]) for n in range(0x50, 0x60))
_WINDOW_LOG_MAX: Final = 25  # what zstd asks for up to level 20; --ultra -22 and --long want more
_STEP_BYTES: Final = 16 * 1024  # a decoder hands back what a short member leaves over: copy little
_WINDOW: Final = "requires too much memory"
HEAD_BYTES: Final = 4
MOST_RATIO: Final = 500  # rows reach a fifth of it, and gzip cannot do more than twice of it
FREE_TEXT_BYTES: Final = 256 * 1024 * 1024  # which any input may have, however small it is


def is_bomb(text_bytes: int, stored_bytes: int) -> bool:
    """Whether so few stored bytes hold so much that it can hardly be meant."""
    return text_bytes > max(FREE_TEXT_BYTES, MOST_RATIO * stored_bytes)


def compression_of(head: bytes) -> Compression:
    """Tell from the first HEAD_BYTES how an input is stored; its name says nothing."""
    if head.startswith(_GZIP_MAGIC):
        return "gzip"
    return "zstd" if head.startswith((_ZSTD_MAGIC, *_ZSTD_SKIPPABLE)) else "none"


def decompressed(raw_blocks: Iterable[bytes], compression: Compression) -> Iterator[bytes]:
    """The text in blocks of useful size, even if the input has a member for every byte."""
    if compression == "none":
        yield from raw_blocks
        return
    members = _Members(compression)
    held: list[bytes] = []
    held_bytes = 0
    for text in chain.from_iterable(map(members.feed, raw_blocks)):
        held.append(text)
        held_bytes += len(text)
        if held_bytes >= BLOCK_BYTES:
            yield b"".join(held)
            held, held_bytes = [], 0
    if held:
        yield b"".join(held)
    members.finish()


class _Broken(Exception):
    """The decoder refuses what it was given, at this byte of it if it can tell."""

    def __init__(self, at: int | None, reason: str) -> None:
        super().__init__(reason)
        self.at = at
        self.reason = reason


class _Step(NamedTuple):
    """What a decoder made of its input: text, and the bytes that it has not taken."""

    text: bytes
    rest: bytes


class _Gzip:
    """One member, decompressed in steps of bounded size; raises _Broken."""

    magic_bytes: Final = 2

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(_GZIP_WBITS)
        self.eof = False

    def step(self, raw: bytes) -> _Step:
        before = self._decoder.copy()
        try:
            text = self._decoder.decompress(raw, BLOCK_BYTES)
        except zlib.error as error:
            raise _Broken(_first_bad_byte(before, raw), str(error)) from None
        self.eof = self._decoder.eof
        return _Step(text, self._decoder.unused_data or self._decoder.unconsumed_tail)

    def has_more(self) -> bool:
        return False  # what it could not take it hands back


class _Zstd:
    """One frame, in the same way; what it could not give at once it keeps."""

    magic_bytes: Final = 4

    def __init__(self) -> None:
        limits = {int(DecompressionParameter.window_log_max): _WINDOW_LOG_MAX}
        self._decoder = ZstdDecompressor(options=limits)
        self.eof = False

    def step(self, raw: bytes) -> _Step:
        try:
            text = self._decoder.decompress(raw, BLOCK_BYTES)
        except ZstdError as error:
            raise _Broken(None, str(error)) from None
        self.eof = self._decoder.eof
        return _Step(text, self._decoder.unused_data if self.eof else b"")

    def has_more(self) -> bool:
        return not self.eof and not self._decoder.needs_input


def _first_bad_byte(decoder: "zlib._Decompress", raw: bytes) -> int:
    for at in range(len(raw)):
        try:
            decoder.decompress(raw[at : at + 1])
        except zlib.error:
            return at
    return len(raw)


class _Members:
    """The members of one input, one behind the other."""

    def __init__(self, compression: Compression) -> None:
        self._name = compression
        self._make = _Gzip if compression == "gzip" else _Zstd
        self._decoder: _Gzip | _Zstd = self._make()
        self._read_bytes = 0
        self._text_bytes = 0
        self._member_start = 0

    def feed(self, raw: bytes) -> Iterator[bytes]:
        """The text that these bytes complete; to be iterated to its end before the next call."""
        for at in range(0, len(raw), _STEP_BYTES):
            rest = raw[at : at + _STEP_BYTES]
            while rest or self._decoder.has_more():
                text, rest = self._step(rest)
                if text:
                    self._text_bytes += len(text)
                    self._require_bounded()
                    yield text

    def finish(self) -> None:
        """Raise InputError when the last member is not complete."""
        if not self._decoder.eof:
            raise InputError(
                f"The {self._name} input is cut off: it ends at byte {self._read_bytes}, within its"
                " compressed data; send the whole file again."
            )

    def _require_bounded(self) -> None:
        if is_bomb(self._text_bytes, self._read_bytes):
            raise InputError(
                f"The {self._name} input holds more than {MOST_RATIO} times its size: of"
                f" {self._read_bytes:,} bytes come {self._text_bytes:,} and more; if that is meant,"
                " unpack it first."
            )

    def _step(self, raw: bytes) -> _Step:
        if self._decoder.eof:
            self._decoder = self._make()
            self._member_start = self._read_bytes
        try:
            step = self._decoder.step(raw)
        except _Broken as broken:
            raise self._refusal(broken, raw) from None
        self._read_bytes += len(raw) - len(step.rest)
        return step

    def _refusal(self, broken: _Broken, raw: bytes) -> InputError:
        if _WINDOW in broken.reason:
            return InputError(
                f"The {self._name} input needs a window of more than"
                f" {2 ** (_WINDOW_LOG_MAX - 20)} MiB of memory; compress it without --ultra and"
                " --long."
            )
        if self._behind_the_last(broken, raw):
            return InputError(
                f"The {self._name} input has other bytes behind its compressed data, from byte"
                f" {self._member_start} on; remove them or compress the file again."
            )
        return InputError(
            f"The {self._name} input is damaged {self._place(broken, raw)}; compress the file"
            " again and send it anew."
        )

    def _behind_the_last(self, broken: _Broken, raw: bytes) -> bool:
        """Whether it is the very beginning of a further member that cannot be one."""
        if not self._member_start:
            return False
        at = self._read_bytes + (broken.at or 0)
        if broken.at is None:
            return at < self._member_start + HEAD_BYTES and compression_of(raw) != self._name
        return at < self._member_start + self._decoder.magic_bytes

    def _place(self, broken: _Broken, raw: bytes) -> str:
        if broken.at is not None:
            return f"at byte {self._read_bytes + broken.at}"
        return f"between byte {self._read_bytes} and {self._read_bytes + len(raw)}"
