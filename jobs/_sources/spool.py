"""How one part of an input is packed for the spool."""

import zlib
from typing import Final

from jobs._errors import InputError
from jobs._sources.compression import Compression

_STORED: Final = b"="
_DEFLATED: Final = b"z"
_FASTEST: Final = 1


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
