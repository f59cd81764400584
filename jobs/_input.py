"""Opening the input of a job: rows in its payload, a file in place, or a file in the spool."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger import spool
from db.ledger.chunk import Span
from jobs._errors import InputError
from jobs._part import ABSENT, Part, Position
from jobs._run import ChunkedRun
from jobs._sources.compression import Compression
from jobs._sources.format import Format, Layout, Shape
from jobs._sources.object_store import ObjectSource
from jobs._sources.opened import Inspection, Opened
from jobs._sources.place import ImportPlace, open_place
from jobs._sources.source import FileSource, PartsSource, Text
from jobs._sources.spool import unpack_part

_KEPT_PARTS = 8  # Parquet is read in several places at once


class InPlace(Shape):
    """A file or an object that the worker reads where it is: a path, or a URI."""

    type: Literal["in_place"]
    path: str


class Spooled(Shape):
    """A file whose bytes were stored in PostgreSQL when the job was enqueued."""

    type: Literal["spooled"]
    name: str
    sha256: str
    raw_bytes: int
    text_bytes: int
    compression: Compression
    part_bytes: int
    format: Format = "csv"
    columns: tuple[str, ...] | None = None

    @property
    def layout(self) -> Layout:
        """What it was recognised as when it was enqueued."""
        return Layout(format=self.format, encoding=self.encoding, delimiter=self.delimiter)

    @property
    def inspection(self) -> Inspection:
        """What was found out about it when it was enqueued."""
        return Inspection(
            self.sha256, self.raw_bytes, self.text_bytes, self.compression, self.columns
        )


@dataclass(frozen=True)
class Input:
    """An opened input: its columns, its identity, and its rows in parts.

    `parts(max_rows, max_bytes, after)` continues behind the given number and span; it blocks, so
    it belongs in a thread. `unchanged` raises InputError when the file is no longer what it was.
    `layout` is None for rows of a payload.
    """

    columns: list[str]
    header: str
    fingerprint: str
    text_bytes: int
    data_start: Position
    parts: Callable[[int, int, Position], Iterator[Part]]
    unchanged: Callable[[], None]
    layout: Layout | None = None

    @property
    def detail(self) -> dict[str, Any]:
        """What the opening receipt keeps of it."""
        return {
            "fingerprint": self.fingerprint,
            "header": self.header,
            "text_bytes": self.text_bytes,
            "layout": self.layout and self.layout.model_dump(),
        }


@asynccontextmanager
async def open_input(
    run: ChunkedRun,
    rows: Sequence[Mapping[str, Any]] | None,
    source: InPlace | Spooled | None,
    places: Sequence[ImportPlace],
) -> AsyncIterator[Input]:
    """Open what the payload names. Raises InputError when it cannot be used as a whole."""
    if rows is not None:
        yield _inline(rows)
    elif isinstance(source, Spooled):
        yield await asyncio.to_thread(open_spooled, run, source, asyncio.get_running_loop())
    elif isinstance(source, InPlace):
        with await asyncio.to_thread(open_place, source.path, places) as stored:
            yield await asyncio.to_thread(_in_place, stored, source)
    else:
        raise InputError("the job has neither rows nor a source")


def _in_place(stored: FileSource | ObjectSource, source: InPlace) -> Input:
    def unchanged() -> None:
        if stored.changed():
            raise InputError(
                f"the file {source.path} was changed while the job read it; what was committed "
                "stays, so give the rows behind it to a new job, or to an import with on_conflict "
                "skip all of them"
            )

    text = Text.of(stored, source.encoding)
    return _input(Opened.recognised(text, stored.name, source), unchanged)


def open_spooled(run: ChunkedRun, source: Spooled, loop: asyncio.AbstractEventLoop) -> Input:
    """Open what is in the spool of the job; it blocks, and belongs in a thread beside the loop."""

    def fetch(number: int) -> bytes | None:
        reading = run.read(lambda session: _part(session, run.claim.job_id, number))
        return asyncio.run_coroutine_threadsafe(reading, loop).result()

    kept = _KEPT_PARTS if source.format == "parquet" else 1
    parts = PartsSource(fetch, source.part_bytes, source.raw_bytes, kept)
    text = Text(parts, source.compression, source.encoding)
    return _input(Opened(text, source.layout, source.inspection), lambda: None)


async def _part(session: AsyncSession, job_id: UUID, number: int) -> bytes | None:
    packed = await spool.read_part(session, job_id, number)
    return None if packed is None else unpack_part(packed)


def _input(opened: Opened, unchanged: Callable[[], None]) -> Input:
    found, reader = opened.inspection, opened.reader

    def parts(max_rows: int, max_bytes: int, after: Position) -> Iterator[Part]:
        yield from reader.parts(max_rows, max_bytes, after)
        unchanged()  # an input that was cut short ends like any other

    return Input(
        columns=reader.columns,
        header=opened.header,
        fingerprint=found.sha256,
        text_bytes=found.text_bytes,
        data_start=reader.start(),
        parts=parts,
        unchanged=unchanged,
        layout=opened.layout,
    )


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
            yield Part(
                number,
                Span(at + 1, end - at, byte, byte + size, at + 1, end + 1),
                rows=[[row.get(name, ABSENT) for name in columns] for row in rows[at:end]],
                lines=range(at + 1, end + 1),
                raws=texts[at:end],
                faults={},
                complete=False,
            )
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
