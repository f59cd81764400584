"""An input that was opened: what it is, what one full pass finds out, and its reader."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

from jobs._errors import InputError
from jobs._part import Part, Position
from jobs._sources.compression import Compression
from jobs._sources.csv import CsvReader
from jobs._sources.format import ARRAY, Layout, Shape, begins_with_array, first_bytes, layout_of
from jobs._sources.ndjson import NdjsonReader, keys_of
from jobs._sources.parquet import ParquetReader
from jobs._sources.source import Text, raw_blocks


class Inspection(NamedTuple):
    """What one full pass found out: the fingerprint covers the bytes as stored.

    `text_bytes` is the size of what is to be read, as the positions of its reader measure it;
    `columns` are the keys of NDJSON, which only such a pass can find.
    """

    sha256: str
    raw_bytes: int
    text_bytes: int
    compression: Compression
    columns: Sequence[str] | None = None


class Reader(Protocol):
    """The rows of an input in parts."""

    @property
    def columns(self) -> list[str]:
        """Their names; raises InputError when the input has none that can be used."""

    def start(self) -> Position:
        """Where the first part begins."""

    def parts(self, max_rows: int, max_bytes: int, start: Position) -> Iterator[Part]:
        """The parts from there on; their boundaries depend on the input and the limits alone."""


class Opened:
    """An input whose layout is known. What is asked for is found out when it is asked for."""

    def __init__(self, text: Text, layout: Layout, inspection: Inspection | None = None) -> None:
        self.text = text
        self.layout = layout
        if inspection is not None:
            self.inspection = inspection

    @classmethod
    def recognised(cls, text: Text, name: str, declared: Shape) -> "Opened":
        """Find out what the input is; raises InputError when its content contradicts that."""
        return cls(text, layout_of(text, name, declared))

    @cached_property
    def inspection(self) -> Inspection:
        """Read the whole input once, before any row is used, so that damage is found in time.

        Raises InputError when the input is empty, damaged or cut off.
        """
        return inspect(self.text, self.layout)

    @cached_property
    def reader(self) -> Reader:
        """The reader of its rows."""
        if self.layout.format == "parquet":
            return ParquetReader(self.text.stored)
        if self.layout.format == "ndjson":
            return self._ndjson(self.inspection.columns or ())
        return CsvReader(self.text, self.layout.delimiter or ",", self.layout.encoding)

    def _ndjson(self, columns: Sequence[str]) -> NdjsonReader:
        return NdjsonReader(self.text, columns, self.layout.encoding)

    def beginning(self, max_rows: int, max_bytes: int) -> tuple[list[str], Iterator[Part]]:
        """Columns and parts, of which the first is to be looked at; only so much is read.

        The columns of NDJSON are the keys of that part. Raises InputError when it has none.
        """
        ndjson = self.layout.format == "ndjson"
        reader = self._ndjson_of(max_rows, max_bytes) if ndjson else self.reader
        return reader.columns, reader.parts(max_rows, max_bytes, reader.start())

    def _ndjson_of(self, max_rows: int, max_bytes: int) -> NdjsonReader:
        first = next(self._ndjson(()).parts(max_rows, max_bytes), None)
        if columns := keys_of(first.raws if first else ()):
            return self._ndjson(columns)
        raise _without_keys(self.text)

    @property
    def header(self) -> str:
        """The line of names as it came, for formats that have one."""
        return self.reader.header().text if isinstance(self.reader, CsvReader) else ""


def inspect(text: Text, layout: Layout) -> Inspection:
    """Fingerprint and verify an input. Raises InputError when it is empty, damaged or cut off."""
    digest = _Digest(text)
    columns = None
    if layout.format == "ndjson":
        columns = keys_of(digest.text())
    else:
        for _ in digest.text():
            pass
    if not digest.text_bytes:
        raise InputError("The input is empty (0 bytes); send a file with rows.")
    if columns == []:
        raise _without_keys(text)
    text_bytes = digest.text_bytes
    if layout.format == "parquet":
        text_bytes = ParquetReader(text.stored).text_bytes()
    return Inspection(
        digest.sha256.hexdigest(), digest.raw_bytes, text_bytes, text.compression, columns
    )


def _without_keys(text: Text) -> InputError:
    """Why an input is no NDJSON, by the fault of its first row."""
    first = next(NdjsonReader(text, (), text.encoding).parts(1, 1), None)
    if first is None:
        return InputError("The input has no rows, only blank lines or nothing; send one with rows.")
    if begins_with_array(first_bytes(text)):
        return InputError(ARRAY)
    fault = first.faults.get(0)
    why = fault.message if fault else "The object has no keys; give it those of the row's values."
    return InputError(
        f"The input is no NDJSON that can be used: no line of it is an object with keys. Line "
        f"{first.lines[0]}: {why} If it is JSON of another form, write one object a line, as "
        "`jq -c .` does; if it is no JSON, declare its format with --format."
    )


class _Digest:
    """Fingerprints and measures an input while it passes by."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self.sha256 = hashlib.sha256()
        self.raw_bytes = 0
        self.text_bytes = 0

    def text(self) -> Iterator[bytes]:
        for block in self._text.passing(self._raw()):
            self.text_bytes += len(block)
            yield block

    def _raw(self) -> Iterator[bytes]:
        for block in raw_blocks(self._text.stored):
            self.sha256.update(block)
            self.raw_bytes += len(block)
            yield block
