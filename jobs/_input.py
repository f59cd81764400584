"""Opening the input of a job: rows in its payload, a file in place, or a file in the spool."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict
from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger import spool
from db.ledger.chunk import Span
from db.refusal import Refusal
from jobs._errors import InputError
from jobs._mapping import ABSENT
from jobs._preparation import Row
from jobs._run import ChunkedRun
from jobs._sources.csv import Chunk, CsvReader, Position, Record
from jobs._sources.source import Compression, FileSource, PartsSource, inspect
from jobs._sources.spool import unpack_part


class InPlace(BaseModel):
    """A file that the worker reads where it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    type: Literal["in_place"]
    path: str


class Spooled(BaseModel):
    """A file whose bytes were stored in PostgreSQL when the job was enqueued."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    type: Literal["spooled"]
    name: str
    sha256: str
    raw_bytes: int
    text_bytes: int
    compression: Compression
    part_bytes: int


@dataclass(frozen=True)
class Part:
    """Consecutive rows of the input, as one chunk of the job; numbered from 1."""

    number: int
    span: Span
    rows: Sequence[Row]


@dataclass(frozen=True)
class Input:
    """An opened input: its columns, its identity, and its rows in parts.

    `parts(max_rows, max_bytes, after)` continues behind the given number and span; it blocks, so
    it belongs in a thread. `unchanged` raises InputError when the file is no longer what it was.
    """

    columns: list[str]
    header: str
    fingerprint: str
    text_bytes: int
    data_start: Position
    parts: Callable[[int, int, Position], Iterator[Part]]
    unchanged: Callable[[], None]


@asynccontextmanager
async def open_input(
    run: ChunkedRun,
    rows: Sequence[Mapping[str, Any]] | None,
    source: InPlace | Spooled | None,
    folders: Sequence[Path],
) -> AsyncIterator[Input]:
    """Open what the payload names. Raises InputError when it cannot be used as a whole."""
    if rows is not None:
        yield _inline(rows)
    elif isinstance(source, Spooled):
        yield await asyncio.to_thread(_spooled, run, source, asyncio.get_running_loop())
    elif isinstance(source, InPlace):
        with await asyncio.to_thread(FileSource, Path(source.path), folders) as file:
            yield await asyncio.to_thread(_in_place, file)
    else:
        raise InputError("the job has neither rows nor a source")


def _in_place(file: FileSource) -> Input:
    found = inspect(file)

    def unchanged() -> None:
        if file.changed():
            raise InputError(
                f"the file {file.path} was changed while it was imported; what was committed "
                "stays, so import the new file with on_conflict skip"
            )

    reader = CsvReader(file)
    return _csv(reader, found.sha256, found.text_bytes, unchanged)


def _spooled(run: ChunkedRun, source: Spooled, loop: asyncio.AbstractEventLoop) -> Input:
    def fetch(number: int) -> bytes | None:
        reading = run.read(lambda session: _part(session, run.claim.job_id, number))
        part = asyncio.run_coroutine_threadsafe(reading, loop).result()
        if part is None and number * source.part_bytes < source.raw_bytes:
            raise InputError(f"part {number} of the spooled input is gone; enqueue it again")
        return part

    parts = PartsSource(fetch, source.part_bytes, source.compression)
    return _csv(CsvReader(parts), source.sha256, source.text_bytes, lambda: None)


async def _part(session: AsyncSession, job_id: UUID, number: int) -> bytes | None:
    packed = await spool.read_part(session, job_id, number)
    return None if packed is None else unpack_part(packed)


def _csv(
    reader: CsvReader, fingerprint: str, text_bytes: int, unchanged: Callable[[], None]
) -> Input:
    header = reader.header()

    def parts(max_rows: int, max_bytes: int, after: Position) -> Iterator[Part]:
        for chunk in reader.chunks(max_rows, max_bytes, after):
            yield Part(chunk.number, _span(chunk), [_row(record) for record in chunk.records])
        unchanged()  # an input that was cut short ends like any other

    return Input(
        columns=header.columns,
        header=header.raw.decode().rstrip("\r\n"),
        fingerprint=fingerprint,
        text_bytes=text_bytes,
        data_start=Position(1, 1, header.end_byte, header.lines + 1),
        parts=parts,
        unchanged=unchanged,
    )


def _span(chunk: Chunk) -> Span:
    return Span(
        chunk.first_row,
        len(chunk.records),
        chunk.start_byte,
        chunk.end_byte,
        chunk.first_line,
        chunk.last_line + 1,
    )


def _row(record: Record) -> Row:
    fault = None
    if record.fault is not None:
        fault = Refusal(record.fault.code, record.fault.message, record.fault.column)
    values = [value or None for value in record.fields or ()]
    return Row(record.line, values, record.raw, fault)


def _inline(rows: Sequence[Mapping[str, Any]]) -> Input:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    texts = [json.dumps(row, ensure_ascii=False).encode() for row in rows]

    def parts(max_rows: int, max_bytes: int, after: Position) -> Iterator[Part]:
        number, at, byte = after.chunk_no, after.row - 1, after.byte
        while at < len(rows):
            end, size = at, 0
            while end < len(rows) and end - at < max_rows and size < max_bytes:
                size += len(texts[end])
                end += 1
            taken = [
                Row(n + 1, [rows[n].get(name, ABSENT) for name in columns], texts[n])
                for n in range(at, end)
            ]
            span = Span(at + 1, end - at, byte, byte + size, at + 1, end + 1)
            yield Part(number, span, taken)
            number, at, byte = number + 1, end, byte + size

    return Input(
        columns=columns,
        header="",
        fingerprint=hashlib.sha256(b"\n".join(texts)).hexdigest(),
        text_bytes=sum(map(len, texts)),
        data_start=Position(1, 1, 0, 1),
        parts=parts,
        unchanged=lambda: None,
    )
