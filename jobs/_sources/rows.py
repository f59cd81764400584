"""Rows of fields out of physical lines, by the grammar of the csv module."""

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final, NamedTuple

from jobs._sources.lines import LongLine, physical_lines


class Fault(NamedTuple):
    """Why a row cannot be used."""

    code: str
    message: str
    column: str | None = None


@dataclass(slots=True)
class Lot:
    """Rows as they were split: fields, bytes, first line and end of each; faults by index.

    `clean` says that every byte is UTF-8 and none is NUL. Blank lines stand as empty rows.
    """

    clean: bool
    rows: list[list[str]] = field(default_factory=list)
    raws: list[bytes] = field(default_factory=list)
    lines: Sequence[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    faults: dict[int, Fault] = field(default_factory=dict)


class Splitter:
    """Splits physical lines into rows; holds back the lines of a quoted field that is still open.

    At the end of a line the csv grammar has two states, between rows and inside quotes. So when a
    search for the closing quote stayed inside quotes up to some line, any later search that is
    inside quotes before that line may start behind it: the work stays linear.
    """

    def __init__(self, line: int, byte: int, max_record_bytes: int) -> None:
        self._line = line
        self._byte = byte
        self._max_bytes = max_record_bytes
        self._unclosed = _unclosed(max_record_bytes)
        self._held: list[bytes] = []
        self._known_open = 0  # of the held lines, so many end inside quotes if the first does

    def lots(self, blocks: Iterable[bytes]) -> Iterator[Lot]:
        """The rows of all blocks, in lots; no row reaches across a line that is too long."""
        for batch in physical_lines(blocks, self._max_bytes):
            if isinstance(batch, LongLine):
                yield self._split([], at_end=True)
                yield self._refused(batch)
            else:
                yield self._split(batch, at_end=False)
        yield self._split([], at_end=True)

    def _refused(self, long: LongLine) -> Lot:
        message = (
            f"The row has {long.size_bytes} bytes in one line and at most {self._max_bytes} are"
            f" allowed; shorten it (only its first {len(long.head)} bytes are kept here)."
        )
        line = self._line
        self._line += 1
        self._byte += long.size_bytes
        fault = Fault("row_too_large", message)
        return Lot(False, [[""]], [long.head], [line], [self._byte], {0: fault})

    def _split(self, new_lines: list[bytes], *, at_end: bool) -> Lot:
        lines = self._held + new_lines
        texts, clean = _decoded(lines)
        rows = None if self._held else _one_row_per_line(texts)
        if rows is None:
            return self._split_carefully(lines, texts, clean, at_end)
        ends = list(accumulate(map(len, lines), initial=self._byte))
        first_line = self._line
        self._line += len(lines)
        self._byte = ends[-1]
        return Lot(clean, rows, lines, range(first_line, self._line), ends[1:])

    def _split_carefully(
        self, lines: list[bytes], texts: list[str], clean: bool, at_end: bool
    ) -> Lot:
        lot, numbers = Lot(clean), list[int]()
        starts = list(accumulate(map(len, lines), initial=self._byte))
        at = 0
        while at < len(lines) and (found := self._row_at(at, texts, starts, at_end)):
            if found.fault:
                lot.faults[len(lot.rows)] = found.fault
            lot.rows.append(found.fields)
            lot.raws.append(b"".join(lines[at : found.stop]))
            lot.ends.append(starts[found.stop])
            numbers.append(self._line + at)
            at = found.stop
        lot.lines = numbers
        self._held, self._known_open = lines[at:], max(0, self._known_open - at)
        self._line, self._byte = self._line + at, starts[at]
        return lot

    def _row_at(
        self, at: int, texts: list[str], starts: list[int], at_end: bool
    ) -> "_Found | None":
        """The row that starts with line `at`, or None when more lines are needed to tell."""
        fields, is_open = parse(texts[at : at + 1])
        if not is_open:
            return _Found(fields, at + 1)
        known_open = max(at + 1, self._known_open)
        closing, closes = _seek_close(texts, starts, known_open, starts[at] + self._max_bytes)
        if closes:
            return _Found(parse(texts[at : closing + 1])[0], closing + 1)
        self._known_open = closing
        if closing == len(texts) and not at_end:
            return None
        return _Found(fields, at + 1, self._unclosed)


class _Found(NamedTuple):
    """A row, the index of the line behind it, and what is wrong with its quotes."""

    fields: list[str]
    stop: int
    fault: Fault | None = None


def _unclosed(max_bytes: int) -> Fault:
    message = (
        f"A quote opened in this line is not closed within {max_bytes} bytes or before the input"
        " ends; close it, or double it inside a quoted value."
    )
    return Fault("unclosed_quote", message)


def _decoded(lines: list[bytes]) -> tuple[list[str], bool]:
    """The lines as text, and whether they are clean; bytes that are not UTF-8 become surrogates."""
    try:
        return list(map(bytes.decode, lines)), b"\0" not in b"".join(lines)
    except UnicodeDecodeError:
        return [line.decode(errors="surrogateescape") for line in lines], False


def _one_row_per_line(texts: list[str]) -> list[list[str]] | None:
    """The rows, or None when some row has several lines or a field too large for the csv module."""
    if not texts:
        return []
    try:
        rows = list(csv.reader(texts))
    except csv.Error:
        return None
    if len(rows) != len(texts) or parse(texts[-1:])[1]:
        return None
    return rows


def _seek_close(
    texts: list[str], starts: list[int], first: int, limit_byte: int
) -> tuple[int, bool]:
    """From line `first` on, find the one that closes a quote still open there.

    Gives its index and True; or False and the index of the line that reaches beyond `limit_byte`,
    or of the end.
    """
    for index in range(first, len(texts)):
        if starts[index + 1] > limit_byte:
            return index, False
        if '"' in texts[index] and not parse(['"' + texts[index]])[1]:
            return index, True
    return len(texts), False


def parse(texts: list[str]) -> tuple[list[str], bool]:
    """The fields of the one row in these lines, and whether a quote is still open at their end."""
    reader = csv.reader([*texts, ""])  # the added line is asked for only inside an open quote
    try:
        fields = next(reader)
    except csv.Error:
        return parse_large("".join(texts))
    return fields, reader.line_num > len(texts)


_FIELD: Final = re.compile(
    r'(?:"(?P<quoted>[^"]*+(?:""[^"]*+)*+)(?P<closing>"?)(?P<rest>[^,\r\n]*)|(?P<bare>[^,\r\n]*))'
    r"(?P<comma>,?)"
)


def parse_large(text: str) -> tuple[list[str], bool]:
    """Do what the csv module does, without its process-wide limit on the size of a field."""
    fields: list[str] = []
    for found in _FIELD.finditer(text):
        if found["quoted"] is None:
            fields.append(found["bare"])
        else:
            fields.append(found["quoted"].replace('""', '"') + found["rest"])
            if not found["closing"]:
                return fields, True
        if not found["comma"]:
            break
    return fields, False
