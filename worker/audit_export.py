"""The whole audit as JSON lines, for `bulwark audit export`."""

from collections.abc import AsyncIterator, Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO
from uuid import UUID

from db.ledger.audit import each_entry
from worker.connection import Sessions
from worker.display import to_json
from worker.whole_file import whole_file


async def export(sessions: Sessions, job_id: UUID | None, out: TextIO) -> int:
    """Write every entry that is committed by now, in the order of jobs, chunks and entries.

    Returns how many there were.
    """
    written = 0
    async for one in _entries(sessions, job_id):
        out.write(to_json(one) + "\n")
        written += 1
    return written


async def export_to_file(sessions: Sessions, job_id: UUID | None, path: Path) -> int:
    """Export into a file, which takes its name when it is complete. Raises BadInput."""
    with whole_file(path) as out, TextIOWrapper(out, encoding="utf-8", newline="\n") as text:
        return await export(sessions, job_id, text)


async def _entries(sessions: Sessions, job_id: UUID | None) -> AsyncIterator[Mapping[str, Any]]:
    async with sessions() as session:
        async for one in each_entry(session, job_id):
            yield one
