"""NDJSON: a row for each line, which is one JSON object, with its numbers exact."""

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from itertools import accumulate, chain
from operator import itemgetter
from typing import Any, Final, NoReturn

from db.refusal import Refusal
from jobs._errors import InputError
from jobs._part import ABSENT, Part, Position, Values
from jobs._sources.csv import MAX_RECORD_BYTES, after_mark, not_decoded
from jobs._sources.encoding import UTF8
from jobs._sources.lines import LongLine, physical_lines
from jobs._sources.lot import Lot, parts_of, too_long
from jobs._sources.source import Source

MAX_COLUMNS: Final = 1600
"""What a PostgreSQL table may have at the most (PostgreSQL manual, appendix K)."""
MAX_EXPONENT: Final = 1000
_ESCAPED_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPED_NUL: Final = b"\\u0000"
_BLANK: Final = " \t\r\n"


class _Unusable(Exception):
    """A row that is no JSON object with exact values, and why."""

    def __init__(self, code: str, message: str, column: str | None = None) -> None:
        super().__init__(message)
        self.refusal = Refusal(code, message, column)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise _Unusable("duplicate_key", f"The key {twice!r} stands twice; leave one out.", twice)
    return found


def _decimal(text: str) -> Decimal:
    number = Decimal(text)
    if abs(number.adjusted()) > MAX_EXPONENT and number:
        message = f"A number has an exponent beyond {MAX_EXPONENT}; write it as a text."
        raise _Unusable("number_out_of_range", message)
    return number


def _no_number(text: str) -> NoReturn:
    raise _Unusable("not_a_number", f"{text} is no value of JSON; write null in its place.")


# without the search for blanks that the decoder's own methods make; typeshed does not have it
_decode: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_decimal, parse_constant=_no_number
).scan_once  # type: ignore[attr-defined]  # typeshed leaves it out


class NdjsonReader:
    """Rows of an input of JSON objects, a line each; `columns` are the keys that they may have.

    A key that a row does not have is ABSENT in it.
    """

    def __init__(
        self,
        source: Source,
        columns: Sequence[str],
        encoding: str = UTF8,
        max_record_bytes: int = MAX_RECORD_BYTES,
    ) -> None:
        self._source = source
        self.columns = list(columns)
        self._encoding = encoding
        self._max_record_bytes = max_record_bytes
        self._pick = _picker(self.columns)

    def start(self) -> Position:
        """Where the first part begins; raises InputError when the input is not UTF-8 at all."""
        return Position(1, 1, after_mark(self._source), 1)

    def parts(self, max_rows: int, max_bytes: int, start: Position | None = None) -> Iterator[Part]:
        """The rows in parts, from the first on or from where another reader got to."""
        start = start or self.start()
        return parts_of(self._lots(start), start, max_rows, max_bytes)

    def _lots(self, start: Position) -> Iterator[Lot]:
        line, byte = start.line, start.byte
        for batch in physical_lines(self._source.blocks(byte), self._max_record_bytes):
            if isinstance(batch, LongLine):
                byte += batch.size_bytes
                yield too_long(batch, line, byte, self._max_record_bytes)
                line += 1
            else:
                lot = self._lot(batch, line, byte)
                line, byte = line + len(batch), byte + sum(map(len, batch))
                yield lot

    def _lot(self, raws: list[bytes], line: int, byte: int) -> Lot:
        lines = range(line, line + len(raws))
        ends = list(accumulate(map(len, raws), initial=byte))[1:]
        objects = _objects(raws)
        if objects is None:
            return self._carefully(raws, lines, ends)
        try:
            return Lot(list(map(self._pick, objects)), raws, lines, ends)
        except KeyError:
            return Lot(self._rows(objects), raws, lines, ends, complete=False)

    def _rows(self, objects: Iterable[dict[str, Any]]) -> list[Values]:
        return [[found.get(name, ABSENT) for name in self.columns] for found in objects]

    def _carefully(self, raws: list[bytes], lines: range, ends: list[int]) -> Lot:
        kept = [index for index, raw in enumerate(raws) if raw.strip()]
        objects, faults = list[dict[str, Any]](), dict[int, Refusal]()
        for place, index in enumerate(kept):
            try:
                objects.append(one_object(raws[index], self._encoding))
            except _Unusable as unusable:
                objects.append({})
                faults[place] = unusable.refusal
        return Lot(
            self._rows(objects),
            [raws[index] for index in kept],
            [lines[index] for index in kept],
            [ends[index] for index in kept],
            faults,
            complete=False,
        )


def _picker(columns: list[str]) -> Callable[[dict[str, Any]], Values]:
    """What takes the values of an object that has all columns, or else raises KeyError."""
    if len(columns) > 1:
        return itemgetter(*columns)
    return lambda found: [found[name] for name in columns]


def keys_of(blocks: Iterable[bytes], max_record_bytes: int = MAX_RECORD_BYTES) -> list[str]:
    """All keys of an input in the order in which they first appear.

    Rows that cannot be used have none. Raises InputError when there are more than a table has.
    """
    keys: dict[str, None] = {}
    for number, batch in enumerate(physical_lines(blocks, max_record_bytes)):
        if isinstance(batch, LongLine):
            continue
        if number == 0:
            batch[0] = batch[0].removeprefix(codecs.BOM_UTF8)
        for found in _objects(batch) or _usable(batch):
            keys.update(found)
        if len(keys) > MAX_COLUMNS:
            raise InputError(
                f"The input has more than {MAX_COLUMNS} different keys, and no table has so many"
                " columns; give each row the same keys, and nest what varies."
            )
    return list(keys)


def _usable(raws: list[bytes]) -> Iterator[dict[str, Any]]:
    for raw in raws:
        try:
            yield one_object(raw) if raw.strip() else {}
        except _Unusable:
            continue


def _objects(raws: list[bytes]) -> list[dict[str, Any]] | None:
    """The objects of lines that all hold one and nothing that has to be looked at closer."""
    blob = b"".join(raws)
    if _ESCAPED_NUL in blob or _ESCAPED_SURROGATE.search(blob):
        return None
    try:
        text = blob.decode()
        sizes = map(len, raws) if text.isascii() else (len(raw.decode()) for raw in raws)
        found = []
        at = 0
        for size in sizes:
            one, end = _decode(text, at)
            at += size
            if type(one) is not dict or text[end:at] not in ("\n", "\r\n", ""):
                return None
            found.append(one)
        if b"[" in blob or blob.count(b"{") > len(raws):
            return [_with_plain_inside(one) for one in found]
    except (UnicodeDecodeError, ValueError, ArithmeticError, RecursionError, StopIteration):
        return None
    except _Unusable:
        return None
    return found


def _with_plain_inside(found: dict[str, Any]) -> dict[str, Any]:
    """The object with numbers inside its objects and arrays as floats, which JSON can have.

    One that would lose digits stays what it is.
    """
    return {
        name: _plain(value) if isinstance(value, (dict, list)) else value
        for name, value in found.items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, Decimal) and Decimal(repr(float(value))) == value:
        return float(value)
    return value


def one_object(raw: bytes, encoding: str = UTF8) -> dict[str, Any]:
    """The object in one line; raises _Unusable with what is wrong with it."""
    text = _text(raw, encoding)
    try:
        found, end = _decode(text, 0)
    except StopIteration as error:
        raise _broken(text, error.value) from None
    except json.JSONDecodeError as error:
        raise _broken(text, error.pos, error.msg) from None
    except RecursionError:
        raise _too_deep() from None
    except (ValueError, ArithmeticError):
        message = "A number has more digits than can be read; write it as a text."
        raise _Unusable("number_out_of_range", message) from None
    if text[end:].strip(_BLANK):
        raise _broken(text, end, "Extra data")
    if type(found) is not dict:
        message = f"The line holds {_kind(found)}; write an object with the row's values."
        raise _Unusable("not_an_object", message)
    try:
        _require_storable(raw, found)
        return _with_plain_inside(found)
    except RecursionError:
        raise _too_deep() from None


def _too_deep() -> _Unusable:
    return _Unusable("invalid_json", "The values are nested too deeply; give them as a text.")


def _text(raw: bytes, encoding: str) -> str:
    try:
        return raw.decode().strip(_BLANK)
    except UnicodeDecodeError as error:
        refusal = not_decoded(error, encoding, None)
        raise _Unusable(refusal.code, refusal.message) from None


def _broken(text: str, at: int, reason: str = "Expecting value") -> _Unusable:
    if at >= len(text):
        reason = f"{reason}, and the line ends"
    return _Unusable(
        "invalid_json", f"The line is no JSON at its character {at + 1}: {reason}; mend it."
    )


def _kind(found: Any) -> str:
    names = {list: "an array", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(found), "a number")


def _require_storable(raw: bytes, found: dict[str, Any]) -> None:
    """Raise _Unusable when an escape stands for what a PostgreSQL text cannot hold."""
    if _ESCAPED_NUL not in raw and not _ESCAPED_SURROGATE.search(raw):
        return
    for name, value in found.items():
        for text in _texts([name, value]):
            shown = name.encode(errors="backslashreplace").decode().replace("\0", "\\0")
            if "\0" in text:
                message = "The value holds \\u0000, which a PostgreSQL text cannot hold; remove it."
                raise _Unusable("nul_byte", message, shown)
            if not _is_unicode(text):
                message = "The value holds half of a surrogate pair, no character; mend it."
                raise _Unusable("lone_surrogate", message, shown)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in chain(value, value.values()) if isinstance(value, dict) else value:
            yield from _texts(inner)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
