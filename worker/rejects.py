"""The rows that a job did not take: as facts about them, and as a file to be mended."""

import csv
import io
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID

from db.ledger import chunk
from db.ledger.verdict import RowVerdict
from jobs._mapping import OWN_PREFIX
from jobs._sources.csv import MAX_RECORD_BYTES
from jobs._sources.rows import parse
from worker.connection import Sessions
from worker.exit_codes import BadInput
from worker.reports import each_verdict

_OWN_COLUMNS = (f"{OWN_PREFIX}line", f"{OWN_PREFIX}reason")
_NO_ROWS = ("row_too_large", "unclosed_quote", "repeated_header")
"""Rows that are cut off, have no end, or would be taken as data behind two columns more."""
_FIELD = re.compile(rb'(?:^|,)("[^"]*+(?:""[^"]*+)*+(?:"[^,]*)?|[^,]*)')


def as_json(job_id: UUID, one: RowVerdict) -> dict[str, Any]:
    """What may be shown of a row: where it stands and why, but none of its bytes."""
    return {
        "job_id": job_id,
        "row": one.row_no,
        "line": one.line,
        "chunk": one.chunk_no,
        "verdict": one.verdict,
        "code": one.code,
        "column": one.column,
        "reason": one.message,
    }


async def export(sessions: Sessions, job_id: UUID, out: BinaryIO) -> int:
    """Write the rows in the shape of the input, each with its line and reason before it.

    The file can be mended and imported as it is: an import passes over the two columns added. A
    row whose end is not known (a quote left open, or too long to keep) stands there as the text of
    one field, with a field too many, so that it spoils no other row and is refused until mended.
    Raises BadInput when the job has not got as far as reading its input. Returns the rows written.
    """
    async with sessions() as session:
        opening = await chunk.read_receipt(session, job_id, chunk.OPENING)
    if opening is None:
        raise BadInput(f"The job {job_id} has read no input, so there is nothing to export.")
    header = (opening.detail or {}).get("header")
    if header:
        return await _export_bytes(each_verdict(sessions, job_id), _Layout.of(header), out)
    return await _export_inline(sessions, job_id, out)


async def export_to_file(sessions: Sessions, job_id: UUID, path: Path) -> int:
    """Export into a file, which takes its name when it is complete. Raises BadInput."""
    unfinished = path.with_name(f"{path.name}.part")
    try:
        out = unfinished.open("wb")
    except OSError as error:
        raise BadInput(f"The file {unfinished} cannot be written: {error.strerror}.") from None
    try:
        with out:
            written = await export(sessions, job_id, out)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return written


async def _export_bytes(rows: AsyncIterator[RowVerdict], layout: "_Layout", out: BinaryIO) -> int:
    written = 0
    end = b"\n"
    async for one in rows:
        raw = one.raw or b""
        if not written:
            end = b"\r\n" if raw.endswith(b"\r\n") else b"\n"
            out.write(layout.header + end)
        row = layout.row(one)
        out.write(row + (b"" if row.endswith((b"\n", b"\r")) else end))
        written += 1
    if not written:
        out.write(layout.header + end)
    return written


@dataclass(frozen=True)
class _Layout:
    """The header of an export, how many columns of the input it has, and which it has not.

    An input that was an export itself has columns of its own, which are not exported again.
    """

    header: bytes
    columns: int
    left_out: frozenset[int]

    @classmethod
    def of(cls, header: str) -> "_Layout":
        """The layout of an export of rows that came under this header."""
        raw = header.encode()
        lines = [line.decode() for line in raw.splitlines(keepends=True)]
        names, _ = parse(lines)
        own = frozenset(at for at, name in enumerate(names) if name.startswith(OWN_PREFIX))
        text = ",".join(_OWN_COLUMNS).encode() + b"," + _without(raw, own)
        return cls(text, len(names) - len(own), own)

    def row(self, one: RowVerdict) -> bytes:
        """The row behind its line and reason: as it came, unless that would spoil the file."""
        raw = one.raw or b""
        before = f"{one.line},{_quoted(' '.join(one.message.split()))},".encode()
        if self._stands_alone(one.code, raw, MAX_RECORD_BYTES - len(before)):
            return before + _without(raw, self.left_out)
        return before + self._as_text(raw)

    def _stands_alone(self, code: str, raw: bytes, most_bytes: int) -> bool:
        """Whether an import reads it as one row, and refuses it while it is as it came."""
        if code in _NO_ROWS or len(raw) > most_bytes:
            return False
        return not self.left_out or len(_fields(raw)) > max(self.left_out)

    def _as_text(self, raw: bytes) -> bytes:
        """One field with the text of the row, and so many empty ones that no import takes it."""
        text = raw.rstrip(b"\r\n").decode(errors="backslashreplace").replace("\0", "\\x00")
        if len(text) > MAX_RECORD_BYTES // 8:  # it may grow so much, and what is refused as too
            text = " ".join(text.splitlines())  # long is the rest of a line and not of a row
        return _quoted(text).encode() + b"," * self.columns


def _without(raw: bytes, left_out: frozenset[int]) -> bytes:
    """The row without the fields at these places; every other byte stays."""
    if not left_out:
        return raw
    text = raw.rstrip(b"\r\n")
    kept = [field for at, field in enumerate(_fields(raw)) if at not in left_out]
    return b",".join(kept) + raw[len(text) :]


def _fields(raw: bytes) -> list[bytes]:
    """The fields of one row as they came, with their quotes."""
    return [found[1] for found in _FIELD.finditer(raw.rstrip(b"\r\n"))]


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


async def _export_inline(sessions: Sessions, job_id: UUID, out: BinaryIO) -> int:
    """Rows that came inside the payload have no header: their columns are all their keys."""
    columns: dict[str, None] = {}
    async for one in each_verdict(sessions, job_id):
        names = json.loads(one.raw or b"{}")
        columns.update(dict.fromkeys(name for name in names if not name.startswith(OWN_PREFIX)))
    text = io.TextIOWrapper(out, "utf-8", newline="", write_through=True)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_OWN_COLUMNS, *columns])
    written = 0
    async for one in each_verdict(sessions, job_id):
        row = json.loads(one.raw or b"{}")
        writer.writerow([one.line, one.message, *(_cell(row.get(name)) for name in columns)])
        written += 1
    text.detach()
    return written


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
