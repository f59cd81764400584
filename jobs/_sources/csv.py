"""CSV as a stream of numbered rows, each with its exact bytes and, if it has one, its fault."""

import codecs
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Final, NamedTuple

from jobs._errors import InputError
from jobs._sources.lines import line_count
from jobs._sources.rows import Fault, Lot, Splitter
from jobs._sources.source import Source

MAX_RECORD_BYTES: Final = 1024 * 1024

_NUL: Final = "The field holds a NUL byte, which a PostgreSQL text cannot hold; remove it."
_FOREIGN_MARKS: Final = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class Record(NamedTuple):
    """One row: the line it starts on, its fields or its fault, and exactly its bytes."""

    line: int
    fields: list[str] | None
    raw: bytes
    fault: Fault | None


class Header(NamedTuple):
    """The column names; `raw` is without byte-order mark, `end_byte` is where the rows begin."""

    columns: list[str]
    raw: bytes
    end_byte: int
    lines: int


@dataclass(frozen=True, slots=True)
class Position:
    """Where to continue: the numbers of the next chunk, row, byte and line."""

    chunk_no: int
    row: int
    byte: int
    line: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows; the byte and line ranges of successive chunks touch each other."""

    number: int
    first_row: int
    records: list[Record]
    start_byte: int
    end_byte: int
    first_line: int
    last_line: int

    @property
    def start(self) -> Position:
        """Where a reader has to start in order to get this chunk again."""
        return Position(self.number, self.first_row, self.start_byte, self.first_line)

    @property
    def next(self) -> Position:
        """Where a reader has to start in order to get the chunk behind this one."""
        next_row = self.first_row + len(self.records)
        return Position(self.number + 1, next_row, self.end_byte, self.last_line + 1)


class CsvReader:
    """Rows of a CSV input with a header, as the csv module reads them."""

    def __init__(self, source: Source, max_record_bytes: int = MAX_RECORD_BYTES) -> None:
        self._source = source
        self._max_record_bytes = max_record_bytes
        self._header: Header | None = None

    def header(self) -> Header:
        """The header, read once; raises InputError when the input has none that can be used."""
        if self._header is None:
            self._header = _read_header(self._source, self._max_record_bytes)
        return self._header

    def chunks(
        self, max_rows: int, max_bytes: int, start: Position | None = None
    ) -> Iterator[Chunk]:
        """The rows in chunks that end at `max_rows` or as soon as `max_bytes` are reached.

        The boundaries depend on the input and the two limits alone, so that a restart at the end
        of any chunk gives the same chunks as an uninterrupted read.
        """
        header = self.header()
        if start is None:
            start = Position(1, 1, header.end_byte, header.lines + 1)
        cutter = _Cutter(start, max_rows, max_bytes)
        splitter = Splitter(start.line, start.byte, self._max_record_bytes)
        for lot in splitter.lots(self._source.blocks(start.byte)):
            yield from cutter.cut(*_judged(lot, header.columns))
        yield from cutter.rest()


def _read_header(source: Source, max_record_bytes: int) -> Header:
    start = _after_mark(_first_bytes(source, 4))
    for lot in Splitter(1, start, max_record_bytes).lots(source.blocks(start)):
        for index, row in enumerate(lot.rows):
            if row:
                return _checked_header(lot, index)
    raise InputError("The input has no header, only blank lines or nothing; add a line of names.")


def _first_bytes(source: Source, count: int) -> bytes:
    head = b""
    for block in source.blocks():
        head += block[:count]
        if len(head) >= count:
            break
    return head


def _after_mark(head: bytes) -> int:
    for mark, encoding in _FOREIGN_MARKS.items():
        if head.startswith(mark):
            raise InputError(
                f"The input is {encoding}, as its byte-order mark says; save it as UTF-8."
            )
    return len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0


def _checked_header(lot: Lot, index: int) -> Header:
    columns, raw, line = lot.rows[index], lot.raws[index], lot.lines[index]
    where = f"The header in line {line}"
    if fault := lot.faults.get(index):
        raise InputError(f"{where} cannot be read: {fault.message}")
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        message = f"{where} is not UTF-8 from its byte {error.start} on; save the input as UTF-8."
        raise InputError(message) from None
    if b"\0" in raw:
        raise InputError(f"{where} has a NUL byte, as UTF-16 has; save the input as UTF-8.")
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


# From rows to chunks


class _Cutter:
    """Collects rows until a chunk is full."""

    def __init__(self, start: Position, max_rows: int, max_bytes: int) -> None:
        if max_rows < 1 or max_bytes < 1:
            raise ValueError("A chunk holds at least 1 row and 1 byte; raise the limit.")
        self._position = start
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._records: list[Record] = []
        self._end_byte = start.byte

    def cut(self, records: list[Record], ends: list[int]) -> Iterator[Chunk]:
        """Add rows, with the byte behind each, and give the chunks that they complete."""
        at = 0
        while at < len(records):
            full_at_byte = self._position.byte + self._max_bytes
            last = bisect_left(ends, full_at_byte, at) + 1
            stop = min(at + self._max_rows - len(self._records), last, len(records))
            self._records += records[at:stop]
            self._end_byte = ends[stop - 1]
            at = stop
            if len(self._records) == self._max_rows or self._end_byte >= full_at_byte:
                yield self._chunk()

    def rest(self) -> Iterator[Chunk]:
        """Give the last chunk, if rows are left for one."""
        if self._records:
            yield self._chunk()

    def _chunk(self) -> Chunk:
        start, last = self._position, self._records[-1]
        last_line = last.line + line_count(last.raw) - 1
        chunk = Chunk(
            number=start.chunk_no,
            first_row=start.row,
            records=self._records,
            start_byte=start.byte,
            end_byte=self._end_byte,
            first_line=start.line,
            last_line=last_line,
        )
        self._position = chunk.next
        self._records = []
        return chunk


# From rows to verdicts on them


def _judged(lot: Lot, columns: list[str]) -> tuple[list[Record], list[int]]:
    """The rows as records, with the byte behind each; blank lines are left out."""
    if _all_well(lot, columns):
        rows = zip(lot.lines, lot.rows, lot.raws, repeat(None))
        return list(map(Record._make, rows)), lot.ends
    records: list[Record] = []
    ends: list[int] = []
    for index, fields in enumerate(lot.rows):
        if not fields:
            continue
        raw = lot.raws[index]
        fault = _in_column(lot.faults.get(index), fields, columns) or _fault(fields, raw, columns)
        records.append(Record(lot.lines[index], None if fault else fields, raw, fault))
        ends.append(lot.ends[index])
    return records, ends


def _all_well(lot: Lot, columns: list[str]) -> bool:
    return (
        lot.clean
        and not lot.faults
        and set(map(len, lot.rows)) == {len(columns)}
        and columns not in lot.rows
    )


def _in_column(fault: Fault | None, fields: list[str], columns: list[str]) -> Fault | None:
    """Add the column of the last field, where the quote was opened."""
    if fault and fault.code == "unclosed_quote":
        return fault._replace(column=_name(columns, len(fields) - 1))
    return fault


def _fault(fields: list[str], raw: bytes, columns: list[str]) -> Fault | None:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return _not_utf8(error, fields, columns)
    if b"\0" in raw:
        return Fault("nul_byte", _NUL, _column_where(lambda text: "\0" in text, fields, columns))
    if len(fields) != len(columns):
        return _wrong_count(len(columns), len(fields))
    if fields == columns:
        return Fault("repeated_header", "The row repeats the header; remove it.")
    return None


def _not_utf8(error: UnicodeDecodeError, fields: list[str], columns: list[str]) -> Fault:
    message = (
        f"Byte 0x{error.object[error.start]:02x} at position {error.start} of the row is not"
        " UTF-8; save the file as UTF-8."
    )
    return Fault("not_utf8", message, _column_where(_has_surrogate, fields, columns))


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _column_where(
    holds: Callable[[str], bool], fields: list[str], columns: list[str]
) -> str | None:
    places = (index for index, text in enumerate(fields) if holds(text))
    return _name(columns, next(places, len(columns)))


def _name(columns: list[str], index: int) -> str | None:
    return columns[index] if index < len(columns) else None


def _wrong_count(expected: int, found: int) -> Fault:
    if found < expected:
        code, remedy = "too_few_fields", "add the missing ones, empty if they have no value"
    else:
        code, remedy = "too_many_fields", "quote a value that holds a comma"
    return Fault(code, f"The row has {found} fields and the header {expected}; {remedy}.")
