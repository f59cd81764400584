"""Physical lines out of blocks of bytes, in bounded memory however long a line is."""

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

KEPT_BYTES: Final = 8192


class LongLine(NamedTuple):
    """A line that is too long to keep: its beginning and its whole length."""

    head: bytes
    size_bytes: int


def physical_lines(blocks: Iterable[bytes], max_bytes: int) -> Iterator[list[bytes] | LongLine]:
    """Complete lines with their ends (LF, CRLF or CR), in lots; a line too long comes on its own.

    Of a line that is too long only the beginning stays in memory.
    """
    tail, head, dropped = b"", b"", 0
    for block in blocks:
        lines = (tail + block).splitlines(keepends=True)
        tail = b""
        if lines and not lines[-1].endswith(b"\n"):
            tail = lines.pop()  # a CR at the very end may be the first half of a CRLF
        if dropped and lines:
            yield LongLine(head, dropped + len(lines.pop(0)))
            dropped = 0
        yield from _without_long(lines, max_bytes)
        if dropped or len(tail) > max(max_bytes, KEPT_BYTES):
            head = head if dropped else tail[:KEPT_BYTES]
            rest = tail[-1:] if tail.endswith(b"\r") else b""
            dropped += len(tail) - len(rest)
            tail = rest
    if dropped:
        yield LongLine(head, dropped + len(tail))
    elif tail:
        yield from _without_long([tail], max_bytes)


def _without_long(lines: list[bytes], max_bytes: int) -> Iterator[list[bytes] | LongLine]:
    """The lines in as few lots as leave those that are too long outside."""
    if max(map(len, lines), default=0) <= max_bytes:
        if lines:
            yield lines
        return
    start = 0
    for at in [at for at, line in enumerate(lines) if len(line) > max_bytes]:
        if at > start:
            yield lines[start:at]
        yield LongLine(lines[at][:KEPT_BYTES], len(lines[at]))
        start = at + 1
    if start < len(lines):
        yield lines[start:]


def line_count(raw: bytes) -> int:
    return len(raw.splitlines())
