"""How an input is cut into parts for the spool, and how one part is packed."""

import zlib
from collections.abc import Iterator
from typing import BinaryIO, Final

from jobs._errors import InputError
from jobs._sources.source import Compression

_STORED: Final = b"="
_DEFLATED: Final = b"z"
_FASTEST: Final = 1


def split_parts(stream: BinaryIO, part_bytes: int) -> Iterator[bytes]:
    """Cut a stream into parts that are full except for the last, however short its reads are."""
    while part := _read_fully(stream, part_bytes):
        yield part


def _read_fully(stream: BinaryIO, wanted: int) -> bytes:
    pieces: list[bytes] = []
    while wanted and (piece := stream.read(wanted)):
        pieces.append(piece)
        wanted -= len(piece)
    return b"".join(pieces)


def pack_part(raw: bytes, compression: Compression) -> bytes:
    """Pack one part for storage; what is compressed already is stored as it is."""
    if compression == "none":
        return _DEFLATED + zlib.compress(raw, _FASTEST)
    return _STORED + raw


def unpack_part(packed: bytes) -> bytes:
    """Give the raw bytes of a packed part; raises InputError when it is damaged."""
    kind, body = packed[:1], packed[1:]
    if kind == _STORED:
        return body
    if kind != _DEFLATED:
        raise InputError(f"A spooled part begins with the unknown {kind!r}; enqueue it again.")
    try:
        return zlib.decompress(body)
    except zlib.error as error:
        raise InputError(f"A spooled part is damaged ({error}); enqueue the input again.") from None
