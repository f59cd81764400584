"""How much memory the pages of Parquet ask for, found without decompressing any of them.

A page says in its header how large it is when it is unpacked, and the library takes its word for
it. Headers are Thrift's compact protocol: github.com/apache/parquet-format, parquet.thrift.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, NamedTuple

from jobs._errors import InputError
from jobs._sources.source import Stored, read_fully

if TYPE_CHECKING:
    import pyarrow.parquet as pq

MOST_PAGE_BYTES: Final = 512 * 1024 * 1024
MOST_DICTIONARY_BYTES: Final = 64 * 1024 * 1024
_HEADER_BYTES: Final = 1024
_MOST_HEADER_BYTES: Final = 16 * 1024 * 1024  # what the library reads at most
_DICTIONARY_PAGE: Final = 2


class PageBytes(NamedTuple):
    """The largest pages that are held at a time, one for each column; unpacked."""

    data: int
    dictionary: int


def page_bytes(stored: Stored, group: "pq.RowGroupMetaData") -> PageBytes:
    """What the pages of a row group take. Raises InputError when that is too much to hold."""
    columns = [_of_column(stored, group.column(n)) for n in range(group.num_columns)]
    found = PageBytes(*(sum(sizes) for sizes in zip(*columns, strict=True))) if columns else _NONE
    _require("pages", found.data, MOST_PAGE_BYTES)
    _require("dictionaries", found.dictionary, MOST_DICTIONARY_BYTES)
    return found


_NONE: Final = PageBytes(0, 0)


def _require(what: str, size: int, most: int) -> None:
    if size > most:
        raise InputError(
            f"The Parquet input has {what} that take {size:,} bytes of memory at a time, and at"
            f" most {most:,} may; write it with pages of a few MiB."
        )


def _of_column(stored: Stored, column: "pq.ColumnChunkMetaData") -> PageBytes:
    starts = (column.data_page_offset, column.dictionary_page_offset)
    at = min(start for start in starts if start)
    end = min(at + column.total_compressed_size, stored.size_bytes)
    largest = _NONE
    while 0 <= at < end:
        header = _header(stored, at)
        if header.kind == _DICTIONARY_PAGE:
            largest = PageBytes(largest.data, max(largest.dictionary, header.unpacked_bytes))
        else:
            largest = PageBytes(max(largest.data, header.unpacked_bytes), largest.dictionary)
        at += header.size + header.packed_bytes
    return largest


class _Header(NamedTuple):
    size: int
    kind: int
    unpacked_bytes: int
    packed_bytes: int


def _header(stored: Stored, at: int) -> _Header:
    wanted = _HEADER_BYTES
    while True:
        data = read_fully(stored, at, wanted)
        try:
            header = _parse(data)
        except IndexError:  # it does not end within what was read
            if len(data) < wanted or wanted >= _MOST_HEADER_BYTES:
                raise _damaged(at) from None
            wanted = min(wanted * 16, _MOST_HEADER_BYTES)
        except (ValueError, RecursionError):
            raise _damaged(at) from None
        else:
            if min(header) < 0:
                raise _damaged(at)
            return header


def _damaged(at: int) -> InputError:
    return InputError(
        f"The Parquet input is damaged: at byte {at} no page begins; write the file again."
    )


def _parse(data: bytes) -> _Header:
    """Raises IndexError where it goes on behind the data, ValueError where it is none."""
    found = {1: 0, 2: 0, 3: 0}
    reader = _Compact(data)
    for field, kind in reader.fields():
        if field in found and kind == _I32:
            found[field] = reader.signed()
        else:
            reader.skip(kind)
    return _Header(reader.at, *found.values())


_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_MOST_DEPTH: Final = 16


class _Compact:
    """A position in Thrift's compact protocol, of which only what is wanted is kept."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._depth = 0
        self.at = 0

    def fields(self) -> Iterable[tuple[int, int]]:
        """The fields of a struct, each of which has to be read or skipped before the next."""
        field = 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else self.signed()
            yield field, head & 0x0F

    def signed(self) -> int:
        number = self._unsigned()
        return (number >> 1) ^ -(number & 1)

    def skip(self, kind: int) -> None:
        if kind in (_I16, _I32, _I64):
            self._unsigned()
        elif kind in (_BYTE, _DOUBLE):
            self.at += 1 if kind == _BYTE else 8
        elif kind == _BINARY:
            size = self._unsigned()
            self.at += size
        elif kind in (_LIST, _SET, _MAP, _STRUCT):
            self._skip_inside(kind)
        elif kind not in (_TRUE, _FALSE):
            raise ValueError("no type of Thrift's")

    def _skip_inside(self, kind: int) -> None:
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise ValueError("too deep for the header of a page")
        if kind == _STRUCT:
            for _, inner in self.fields():
                self.skip(inner)
        else:
            kinds, size = self._collection(kind)
            for _ in range(size):
                for inner in kinds:
                    self._skip_element(inner)
        self._depth -= 1

    def _collection(self, kind: int) -> tuple[list[int], int]:
        if kind == _MAP:
            size = self._unsigned()
            both = self._byte() if size else 0
            return [both >> 4, both & 0x0F], size
        head = self._byte()
        return [head & 0x0F], self._unsigned() if head >> 4 == 0x0F else head >> 4

    def _skip_element(self, kind: int) -> None:
        if kind in (_TRUE, _FALSE):
            self.at += 1  # only a field has its truth in its type
        else:
            self.skip(kind)
        if self.at > len(self._data):
            raise IndexError

    def _unsigned(self) -> int:
        number = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
        raise ValueError("no number of 64 bits")

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]
