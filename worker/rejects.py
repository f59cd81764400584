"""The rows that a job did not take: as facts about them, and as a file to be mended."""

import csv
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID

from db.ledger import chunk
from db.ledger.verdict import RowVerdict
from jobs._mapping import OWN_PREFIX
from jobs._sources.csv import MAX_RECORD_BYTES
from jobs._sources.grammar import Grammar
from worker.connection import Sessions
from worker.exit_codes import BadInput
from worker.ndjson_rejects import mendable
from worker.reports import each_verdict
from worker.whole_file import whole_file

_OWN_COLUMNS = (f"{OWN_PREFIX}line", f"{OWN_PREFIX}reason")
_NO_ROWS = ("row_too_large", "unclosed_quote", "repeated_header")
"""Rows that are cut off, have no end, or would be taken as data behind two columns more."""
_USUAL_LAYOUT = {"format": "csv", "delimiter": ","}


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
    NDJSON comes back as NDJSON, and so does Parquet. All of it is UTF-8, whatever the input was.
    Raises BadInput when the job has not got as far as reading its input. Returns the rows written.
    """
    async with sessions() as session:
        opening = await chunk.read_receipt(session, job_id, chunk.OPENING)
    if opening is None:
        raise BadInput(f"The job {job_id} has read no input, so there is nothing to export.")
    detail = opening.detail or {}
    header, layout = detail.get("header"), detail.get("layout") or _USUAL_LAYOUT
    rows = each_verdict(sessions, job_id)
    if layout["format"] in ("ndjson", "parquet"):
        return await _export_lines(rows, out)
    if header:
        return await _export_bytes(rows, _Layout.of(header, Grammar(layout["delimiter"])), out)
    return await _export_inline(sessions, job_id, out)


async def export_to_file(sessions: Sessions, job_id: UUID, path: Path) -> int:
    """Export into a file, which takes its name when it is complete. Raises BadInput."""
    with whole_file(path) as out:
        return await export(sessions, job_id, out)


async def _export_lines(rows: AsyncIterator[RowVerdict], out: BinaryIO) -> int:
    written = 0
    async for one in rows:
        out.write(mendable(one))
        written += 1
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

    grammar: Grammar
    header: bytes
    columns: int
    left_out: frozenset[int]

    @classmethod
    def of(cls, header: str, grammar: Grammar) -> "_Layout":
        """The layout of an export of rows that came under this header."""
        raw = header.encode()
        lines = [line.decode() for line in raw.splitlines(keepends=True)]
        names, _ = grammar.parse(lines)
        own = frozenset(at for at, name in enumerate(names) if name.startswith(OWN_PREFIX))
        bare = cls(grammar, b"", len(names) - len(own), own)
        text = grammar.delimiter.join((*_OWN_COLUMNS, "")).encode() + bare.without_own(raw)
        return cls(grammar, text, bare.columns, own)

    def row(self, one: RowVerdict) -> bytes:
        """The row behind its line and reason: as it came, unless that would spoil the file."""
        raw = one.raw or b""
        reason = _quoted(" ".join(one.message.split()))
        before = self.grammar.delimiter.join((str(one.line), reason, "")).encode()
        if self._stands_alone(one.code, raw, MAX_RECORD_BYTES - len(before)):
            return before + self.without_own(raw)
        return before + self._as_text(raw)

    def without_own(self, raw: bytes) -> bytes:
        """The row without the fields of an earlier export; every other byte stays."""
        if not self.left_out:
            return raw
        text = raw.rstrip(b"\r\n")
        fields = self.grammar.raw_fields(raw)
        kept = [field for at, field in enumerate(fields) if at not in self.left_out]
        return self.grammar.delimiter.encode().join(kept) + raw[len(text) :]

    def _stands_alone(self, code: str, raw: bytes, most_bytes: int) -> bool:
        """Whether an import reads it as one row, and refuses it while it is as it came."""
        if code in _NO_ROWS or len(raw) > most_bytes:
            return False
        return not self.left_out or len(self.grammar.raw_fields(raw)) > max(self.left_out)

    def _as_text(self, raw: bytes) -> bytes:
        """One field with the text of the row, and so many empty ones that no import takes it."""
        text = raw.rstrip(b"\r\n").decode(errors="backslashreplace").replace("\0", "\\x00")
        if len(text) > MAX_RECORD_BYTES // 8:  # it may grow so much, and what is refused as too
            text = " ".join(text.splitlines())  # long is the rest of a line and not of a row
        return _quoted(text).encode() + self.grammar.delimiter.encode() * self.columns


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
