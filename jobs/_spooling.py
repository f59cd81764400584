"""Enqueueing an import of a file: its bytes go into the spool with the job's row."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger import spool
from jobs._declaration import Payload
from jobs._errors import InputError
from jobs._input import Spooled
from jobs._producer import Enqueued, Producer, new_job_id
from jobs._sources.format import Shape
from jobs._sources.opened import Opened
from jobs._sources.place import open_place, printable
from jobs._sources.source import Stored, Text, raw_blocks
from jobs._sources.spool import pack_part
from jobs.insert_rows import InsertRows

PART_BYTES = 1024 * 1024
_NOTHING_DECLARED = Shape()


async def enqueue_file(
    producer: Producer,
    path: Path,
    request: dict[str, Any],
    *,
    declared: Shape = _NOTHING_DECLARED,
    job_id: UUID | None = None,
    **terms: Any,
) -> Enqueued:
    """Accept an import of the file: spool and job are there together, or neither is.

    `request` holds the fields of InsertRows but its source, `terms` what `Producer.enqueue`
    takes. Raises InputError when the file is empty, damaged, or changes while it is read.
    """
    with await asyncio.to_thread(open_place, str(path)) as stored:
        text = await asyncio.to_thread(Text.of, stored, declared.encoding)
        opened = await asyncio.to_thread(Opened.recognised, text, path.name, declared)
        return await enqueue_opened(producer, opened, path.name, request, job_id=job_id, **terms)


async def enqueue_opened(
    producer: Producer,
    opened: Opened,
    name: str,
    request: dict[str, Any],
    *,
    payload_class: type[Payload] = InsertRows,
    job_id: UUID | None = None,
    **terms: Any,
) -> Enqueued:
    """Accept a job on what was opened, in the same way; `request` are fields of its payload."""
    job_id = job_id or new_job_id()
    found = await asyncio.to_thread(lambda: opened.inspection)
    source = Spooled(
        type="spooled",
        name=printable(name),
        part_bytes=PART_BYTES,
        **found._asdict(),
        **opened.layout.model_dump(),
    )
    payload = payload_class(**{**request, "source": source})

    async def accept(session: AsyncSession) -> Enqueued:
        """After a lost answer to COMMIT the job and its parts may be there already."""
        accepted = await producer.enqueue(payload, session=session, job_id=job_id, **terms)
        if accepted.created and not await spool.is_spooled(session, job_id):
            await spool.write_parts(session, job_id, _parts(opened.text.stored, source))
        return accepted

    return await producer.in_transaction(accept)


async def _parts(stored: Stored, source: Spooled) -> AsyncIterator[bytes]:
    """The packed parts; InputError when their bytes are not those that were inspected."""
    digest = hashlib.sha256()
    held = b""
    for block in raw_blocks(stored):
        digest.update(block)
        held += block
        while len(held) >= PART_BYTES:
            yield await asyncio.to_thread(pack_part, held[:PART_BYTES], source.compression)
            held = held[PART_BYTES:]
    if held:
        yield await asyncio.to_thread(pack_part, held, source.compression)
    if digest.hexdigest() != source.sha256:
        raise InputError(f"the file {source.name} changed while it was read; try again")
