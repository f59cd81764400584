"""CSV, or whatever delimiter stands for the comma, as parts of rows, each with its exact bytes."""

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from db.refusal import Refusal
from jobs._errors import InputError
from jobs._part import Part, Position, Values
from jobs._sources.encoding import UTF8, marked_byte
from jobs._sources.grammar import Grammar
from jobs._sources.lines import line_count
from jobs._sources.lot import Lot, parts_of
from jobs._sources.rows import Splitter
from jobs._sources.source import Source

MAX_RECORD_BYTES: Final = 1024 * 1024

_NUL: Final = "The field holds a NUL byte, which a PostgreSQL text cannot hold; remove it."
_FOREIGN_MARKS: Final = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class Header(NamedTuple):
    """The column names; `raw` is without byte-order mark, `end_byte` is where the rows begin."""

    columns: list[str]
    raw: bytes
    end_byte: int
    lines: int

    @property
    def text(self) -> str:
        """The line as it came, without its end."""
        return self.raw.decode().rstrip("\r\n")

    @property
    def next(self) -> Position:
        """Where the first part begins."""
        return Position(1, 1, self.end_byte, self.lines + 1)


class CsvReader:
    """Rows of an input with a header, as the csv module reads them.

    `encoding` is that of the input before it came here, as UTF-8; it is named to the user.
    """

    def __init__(
        self,
        source: Source,
        delimiter: str = ",",
        encoding: str = UTF8,
        max_record_bytes: int = MAX_RECORD_BYTES,
    ) -> None:
        self._source = source
        self._grammar = Grammar(delimiter)
        self._encoding = encoding
        self._max_record_bytes = max_record_bytes
        self._header: Header | None = None

    def header(self) -> Header:
        """The header, read once; raises InputError when the input has none that can be used."""
        if self._header is None:
            self._header = self._read_header()
        return self._header

    @property
    def columns(self) -> list[str]:
        """The names in the header."""
        return self.header().columns

    def start(self) -> Position:
        """Where the first part begins."""
        return self.header().next

    def parts(self, max_rows: int, max_bytes: int, start: Position | None = None) -> Iterator[Part]:
        """The rows in parts, from the first on or from where another reader got to."""
        header = self.header()
        start = start or header.next
        judge = _Judge(header.columns, self._grammar.delimiter, self._encoding)
        splitter = Splitter(self._grammar, start.line, start.byte, self._max_record_bytes)
        lots = map(judge.judged, splitter.lots(self._source.blocks(start.byte)))
        return parts_of(lots, start, max_rows, max_bytes)

    def _read_header(self) -> Header:
        start = after_mark(self._source)
        splitter = Splitter(self._grammar, 1, start, self._max_record_bytes)
        for lot in splitter.lots(self._source.blocks(start)):
            for index, row in enumerate(lot.rows):
                if row:
                    return _checked_header(lot, index, self._encoding)
        raise InputError(
            "The input has no header, only blank lines or nothing; add a line of names."
        )


def after_mark(source: Source) -> int:
    """Where the text begins; raises InputError when a byte-order mark says that it is not UTF-8."""
    head = _first_bytes(source, 4)
    for mark, encoding in _FOREIGN_MARKS.items():
        if head.startswith(mark):
            raise InputError(
                f"The input is {encoding}, as its byte-order mark says; save it as UTF-8, or"
                f" declare it with --encoding {encoding.lower()}."
            )
    return len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0


def _first_bytes(source: Source, count: int) -> bytes:
    head = b""
    for block in source.blocks():
        head += block[:count]
        if len(head) >= count:
            break
    return head


def _checked_header(lot: Lot, index: int, encoding: str) -> Header:
    columns, raw, line = list(lot.rows[index]), lot.raws[index], lot.lines[index]
    where = f"The header in line {line}"
    if fault := lot.faults.get(index):
        raise InputError(f"{where} cannot be read: {fault.message}")
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        place = f" from its byte {error.start} on" if encoding == UTF8 else ""
        remedy = f"save the input as {_shown(encoding)}, or declare its encoding with --encoding."
        raise InputError(f"{where} is not {_shown(encoding)}{place}; {remedy}") from None
    if b"\0" in raw:
        raise InputError(
            f"{where} has a NUL byte, as UTF-16 has; save the input as UTF-8, or declare its"
            " encoding with --encoding."
        )
    _check_names(columns, where)
    return Header(columns, raw, lot.ends[index], line + line_count(raw) - 1)


def _check_names(columns: list[str], where: str) -> None:
    seen: dict[str, int] = {}
    for place, name in enumerate(columns, 1):
        if not name.strip():
            raise InputError(f"{where} has no name for column {place}; name it or remove it.")
        if name in seen:
            raise InputError(
                f"{where} has the name {name!r} twice, as columns {seen[name]} and {place};"
                " rename or remove one."
            )
        seen[name] = place


# From rows to verdicts on them


class _Judge:
    """Finds the rows that cannot be used, leaves out blank lines, and makes "" into None."""

    def __init__(self, columns: list[str], delimiter: str, encoding: str) -> None:
        self._columns = columns
        self._delimiter = delimiter
        self._encoding = encoding

    def judged(self, lot: Lot) -> Lot:
        if self._all_well(lot):
            lot.rows = _with_none(lot.rows)
            return lot
        kept = [index for index, fields in enumerate(lot.rows) if fields]
        faults: dict[int, Refusal] = {}
        for place, index in enumerate(kept):
            fields, raw = list(lot.rows[index]), lot.raws[index]
            if fault := self._in_column(lot.faults.get(index), fields) or self._fault(fields, raw):
                faults[place] = fault
        return Lot(
            rows=_with_none([lot.rows[index] for index in kept]),
            raws=[lot.raws[index] for index in kept],
            lines=[lot.lines[index] for index in kept],
            ends=[lot.ends[index] for index in kept],
            faults=faults,
        )

    def _all_well(self, lot: Lot) -> bool:
        return (
            lot.clean
            and not lot.faults
            and set(map(len, lot.rows)) == {len(self._columns)}
            and self._columns not in lot.rows
        )

    def _in_column(self, fault: Refusal | None, fields: list[str]) -> Refusal | None:
        """Add the column of the last field, where the quote was opened."""
        if fault and fault.code == "unclosed_quote":
            return replace(fault, column=self._name(len(fields) - 1))
        return fault

    def _fault(self, fields: list[str], raw: bytes) -> Refusal | None:
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            column = self._column_where(_has_surrogate, fields)
            return not_decoded(error, self._encoding, column)
        if b"\0" in raw:
            return Refusal("nul_byte", _NUL, self._column_where(lambda text: "\0" in text, fields))
        if len(fields) != len(self._columns):
            return self._wrong_count(len(fields))
        if fields == self._columns:
            return Refusal("repeated_header", "The row repeats the header; remove it.")
        return None

    def _column_where(self, holds: Callable[[str], bool], fields: list[str]) -> str | None:
        places = (index for index, text in enumerate(fields) if holds(text))
        return self._name(next(places, len(self._columns)))

    def _name(self, index: int) -> str | None:
        return self._columns[index] if index < len(self._columns) else None

    def _wrong_count(self, found: int) -> Refusal:
        expected = len(self._columns)
        if found < expected:
            code, remedy = "too_few_fields", "add the missing ones, empty if they have no value"
        else:
            sign = {",": "comma", "\t": "tab"}.get(self._delimiter, f"{self._delimiter!r}")
            code, remedy = "too_many_fields", f"quote a value that holds a {sign}"
        return Refusal(code, f"The row has {found} fields and the header {expected}; {remedy}.")


def _with_none(rows: Sequence[Values]) -> list[Values]:
    """An empty field is NULL."""
    return [row if "" not in row else [value or None for value in row] for row in rows]


def not_decoded(error: UnicodeDecodeError, encoding: str, column: str | None) -> Refusal:
    """What is wrong with a row that is not UTF-8, or was not what it was declared to be."""
    raw = error.object
    at, byte = error.start, raw[error.start]
    if encoding != UTF8:
        before = raw[: error.start].decode()
        mark = marked_byte(raw[at : at + 3].decode(errors="surrogatepass"))
        at, byte = len(before), byte if mark is None else mark
    place = "position" if encoding == UTF8 else "character"
    message = (
        f"Byte 0x{byte:02x} at {place} {at} of the row is not {_shown(encoding)}; save the file"
        f" as {_shown(encoding)}, or declare the encoding that it has."
    )
    return Refusal("not_utf8" if encoding == UTF8 else "not_decoded", message, column)


def _shown(encoding: str) -> str:
    return "UTF-8" if encoding == UTF8 else encoding


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
