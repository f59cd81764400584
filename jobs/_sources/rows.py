"""Rows of fields out of physical lines, by the grammar of the csv module."""

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

from db.refusal import Refusal
from jobs._sources.grammar import Grammar
from jobs._sources.lines import LongLine, physical_lines
from jobs._sources.lot import Lot, too_long


class Splitter:
    """Splits physical lines into rows; holds back the lines of a quoted field that is still open.

    At the end of a line the csv grammar has two states, between rows and inside quotes. So when a
    search for the closing quote stayed inside quotes up to some line, any later search that is
    inside quotes before that line may start behind it: the work stays linear.
    """

    def __init__(self, grammar: Grammar, line: int, byte: int, max_record_bytes: int) -> None:
        self._grammar = grammar
        self._line = line
        self._byte = byte
        self._max_bytes = max_record_bytes
        self._unclosed = _unclosed(max_record_bytes)
        self._held: list[bytes] = []
        self._known_open = 0  # of the held lines, so many end inside quotes if the first does

    def lots(self, blocks: Iterable[bytes]) -> Iterator[Lot]:
        """The rows of all blocks, in lots, in which blank lines stand as empty rows.

        No row reaches across a line that is too long.
        """
        for batch in physical_lines(blocks, self._max_bytes):
            if isinstance(batch, LongLine):
                yield self._split([], at_end=True)
                yield self._refused(batch)
            else:
                yield self._split(batch, at_end=False)
        yield self._split([], at_end=True)

    def _refused(self, long: LongLine) -> Lot:
        self._line += 1
        self._byte += long.size_bytes
        return too_long(long, self._line - 1, self._byte, self._max_bytes)

    def _split(self, new_lines: list[bytes], *, at_end: bool) -> Lot:
        lines = self._held + new_lines if self._held else new_lines
        texts, clean = _decoded(lines)
        rows = None if self._held else self._grammar.rows(texts)
        if rows is None:
            return self._split_carefully(lines, texts, clean, at_end)
        ends = list(accumulate(map(len, lines), initial=self._byte))
        first_line = self._line
        self._line += len(lines)
        self._byte = ends[-1]
        return Lot(rows, lines, range(first_line, self._line), ends[1:], clean=clean)

    def _split_carefully(
        self, lines: list[bytes], texts: list[str], clean: bool, at_end: bool
    ) -> Lot:
        rows, raws = list[list[str]](), list[bytes]()
        numbers, ends = list[int](), list[int]()
        faults: dict[int, Refusal] = {}
        starts = list(accumulate(map(len, lines), initial=self._byte))
        at = 0
        while at < len(lines) and (found := self._row_at(at, texts, starts, at_end)):
            if found.fault:
                faults[len(rows)] = found.fault
            rows.append(found.fields)
            raws.append(b"".join(lines[at : found.stop]))
            ends.append(starts[found.stop])
            numbers.append(self._line + at)
            at = found.stop
        self._held, self._known_open = lines[at:], max(0, self._known_open - at)
        self._line, self._byte = self._line + at, starts[at]
        return Lot(rows, raws, numbers, ends, faults, clean=clean)

    def _row_at(
        self, at: int, texts: list[str], starts: list[int], at_end: bool
    ) -> "_Found | None":
        """The row that starts with line `at`, or None when more lines are needed to tell."""
        fields, is_open = self._grammar.parse(texts[at : at + 1])
        if not is_open:
            return _Found(fields, at + 1)
        known_open = max(at + 1, self._known_open)
        closing, closes = self._seek_close(texts, starts, known_open, starts[at] + self._max_bytes)
        if closes:
            return _Found(self._grammar.parse(texts[at : closing + 1])[0], closing + 1)
        self._known_open = closing
        if closing == len(texts) and not at_end:
            return None
        return _Found(fields, at + 1, self._unclosed)

    def _seek_close(
        self, texts: list[str], starts: list[int], first: int, limit_byte: int
    ) -> tuple[int, bool]:
        """From line `first` on, find the one that closes a quote still open there.

        Gives its index and True; or False and the index of the line that reaches beyond
        `limit_byte`, or of the end.
        """
        for index in range(first, len(texts)):
            if starts[index + 1] > limit_byte:
                return index, False
            if '"' in texts[index] and not self._grammar.parse(['"' + texts[index]])[1]:
                return index, True
        return len(texts), False


class _Found(NamedTuple):
    """A row, the index of the line behind it, and what is wrong with its quotes."""

    fields: list[str]
    stop: int
    fault: Refusal | None = None


def _unclosed(max_bytes: int) -> Refusal:
    message = (
        f"A quote opened in this line is not closed within {max_bytes} bytes or before the input"
        " ends; close it, or double it inside a quoted value."
    )
    return Refusal("unclosed_quote", message)


def _decoded(lines: list[bytes]) -> tuple[list[str], bool]:
    """The lines as text, and whether they are clean; bytes that are not UTF-8 become surrogates."""
    try:
        return list(map(bytes.decode, lines)), b"\0" not in b"".join(lines)
    except UnicodeDecodeError:
        return [line.decode(errors="surrogateescape") for line in lines], False
