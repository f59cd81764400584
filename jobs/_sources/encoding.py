"""Text in any declared encoding as UTF-8, with what cannot be read marked where it stands."""

import codecs
from collections.abc import Iterable, Iterator
from typing import Final

from jobs._errors import InputError

UTF8: Final = "utf-8"
_MARKING: Final = "bulwark.marking"
_FIRST_MARK: Final = 0xDC00
_NO_TEXT: Final = frozenset({"idna", "punycode", "undefined", "unicode_escape"})
"""Encodings of the standard library that are not meant for files."""


def encoding_name(given: str) -> str:
    """The one name of an encoding; raises ValueError when there is none that could be meant."""
    try:
        found = codecs.lookup(given)
        "a".encode(found.name)
    except (LookupError, UnicodeError):
        found = None
    if found is None or found.name in _NO_TEXT or "escape" in found.name:
        raise ValueError(f"{given!r} is no encoding, such as utf-8, utf-16, latin-1 or cp1252")
    return found.name


def utf8_blocks(blocks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """The text as UTF-8, where each byte that the encoding has no character for becomes a mark.

    A mark is a lone surrogate, which no UTF-8 may hold: the row is then refused as UTF-8 is, and
    `marked_byte` tells what stood there.
    """
    if encoding == UTF8:
        yield from blocks
        return
    codecs.register_error(_MARKING, _mark)
    decoder = codecs.getincrementaldecoder(encoding)(_MARKING)
    try:
        for block in blocks:
            if text := decoder.decode(block):
                yield text.encode(errors="surrogatepass")
        if text := decoder.decode(b"", True):
            yield text.encode(errors="surrogatepass")
    except UnicodeError as error:  # what no handler mends: utf-16 without a byte-order mark
        raise InputError(
            f"The input is not {encoding}: {error}; declare {encoding}-le or {encoding}-be."
        ) from None


def marked_byte(character: str) -> int | None:
    """The byte for which this character is the mark, or None if it is another character."""
    byte = ord(character) - _FIRST_MARK
    return byte if 0 <= byte < 256 else None


def _mark(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    bad = error.object[error.start : error.end]
    return "".join(chr(_FIRST_MARK + byte) for byte in bad), error.end
