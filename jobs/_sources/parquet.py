"""Parquet as parts of rows, decoded a few at a time however large its row groups are."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, NamedTuple

from jobs._errors import InputError
from jobs._part import Part, Position
from jobs._sources.compression import MOST_RATIO, is_bomb
from jobs._sources.lot import Lot, parts_of
from jobs._sources.parquet_pages import page_bytes
from jobs._sources.parquet_rows import AsJson, first_line, rows_of
from jobs._sources.source import Stored, read_fully

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MAGIC: Final = b"PAR1"
_BUFFER_BYTES: Final = 64 * 1024
MAX_PART_ROWS: Final = 5_000  # what the library takes is no longer there for rows under way
_BATCH_ROWS: Final = 128  # few, since a dictionary may make any number of large values of one
_LEAST_BATCH_ROWS: Final = 8
_BATCH_BYTES: Final = 1024 * 1024 * 1024  # which a batch would take if it repeated its dictionaries


class ParquetReader:
    """Rows of a Parquet input; a position in bytes counts the bytes of the decoded values.

    The library behind it, some tens of megabytes, is loaded with the first one. It is called in
    one thread only, whoever reads: the allocator keeps memory for each thread that has used it.
    """

    def __init__(self, stored: Stored) -> None:
        self._thread = ThreadPoolExecutor(1, "parquet")
        self._stored = stored
        self._file = self._thread.submit(_opened, stored).result()
        metadata = self._file.metadata
        self._group_rows = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
        self.columns: Final = _checked_names(self._file.schema_arrow.names)

    def start(self) -> Position:
        """Where the first part begins."""
        return Position(1, 1, 0, 1)

    def text_bytes(self) -> int:
        """The decoded size; raises InputError on damage and on a bomb, for it decodes all."""
        size = 0
        for batch, row_bytes in self._batches(0):
            size += batch.num_rows * row_bytes
            if is_bomb(size, self._stored.size_bytes):
                raise InputError(
                    f"The Parquet input holds more than {MOST_RATIO} times its size: of"
                    f" {self._stored.size_bytes:,} bytes come {size:,} and more; if that is meant,"
                    " write it without compression and dictionaries."
                )
        return size

    def parts(self, max_rows: int, max_bytes: int, start: Position | None = None) -> Iterator[Part]:
        """The rows in parts of at most MAX_PART_ROWS, from the first on or from a position."""
        start = start or self.start()
        return parts_of(self._lots(start), start, min(max_rows, MAX_PART_ROWS), max_bytes)

    def _lots(self, start: Position) -> Iterator[Lot]:
        line, byte = start.line, start.byte
        for batch, row_bytes in self._batches(start.row - 1):
            rows, faults = rows_of(batch)
            lines = range(line, line + len(rows))
            ends = range(byte + row_bytes, byte + row_bytes * len(rows) + 1, row_bytes)
            yield Lot(rows, AsJson(self.columns, rows), lines, ends, faults)
            line, byte = lines.stop, ends[-1]

    def _batches(self, first_row: int) -> Iterator["_Batch"]:
        """All rows from one on, in the same batches from wherever; groups before are not read."""
        for number, rows in enumerate(self._group_rows):
            if first_row < rows:
                yield from self._batches_of(number, first_row)
            first_row = max(0, first_row - rows)

    def _batches_of(self, group: int, first_row: int) -> Iterator["_Batch"]:
        import pyarrow as pa

        try:
            batch_rows = self._batch_rows(group)
            batches = self._file.iter_batches(batch_rows, [group], use_threads=False)
            while (batch := self._thread.submit(next, batches, None).result()) is not None:
                if first_row < batch.num_rows:
                    yield _Batch(batch.slice(first_row), 1 + batch.nbytes // batch.num_rows)
                first_row = max(0, first_row - batch.num_rows)
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"The Parquet input is damaged in row group {group} ({first_line(error)}); write"
                " the file again."
            ) from None

    def _batch_rows(self, group: int) -> int:
        """How many rows fit into memory at a time; InputError when the pages alone do not."""
        dictionaries = page_bytes(self._stored, self._file.metadata.row_group(group)).dictionary
        fitting = _BATCH_BYTES // max(1, dictionaries)
        return max(_LEAST_BATCH_ROWS, min(_BATCH_ROWS, fitting))


class _Batch(NamedTuple):
    """Consecutive rows, and the bytes that one of them has on average."""

    batch: "pa.RecordBatch"
    row_bytes: int


def _opened(stored: Stored) -> "pq.ParquetFile":
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_memory_pool(pa.system_memory_pool())  # the others keep what they were given back
    try:
        file = pq.ParquetFile(
            pa.PythonFile(_File(stored), mode="r"),
            buffer_size=_BUFFER_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        )
        _ = file.schema_arrow.names
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"The Parquet input cannot be opened ({first_line(error)}); send the whole file again."
        ) from None
    except UnicodeDecodeError:
        raise InputError(
            "The Parquet input has a column whose name is not UTF-8; rename it, or send the whole"
            " file again if it is damaged."
        ) from None
    return file


def _checked_names(names: list[str]) -> list[str]:
    for name in names:
        if not name.strip() or names.count(name) > 1:
            raise InputError(
                f"The Parquet input has a column {name!r} without a name of its own; rename it."
            )
    return names


class _File(io.RawIOBase):
    """What pyarrow reads from: a position in a stored input."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._stored.size_bytes}
        self._at = base[whence] + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        wanted = self._stored.size_bytes - self._at if size < 0 else size
        data = read_fully(self._stored, self._at, wanted)
        self._at += len(data)
        return data
