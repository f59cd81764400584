"""Seal the audit, so that `bulwark audit verify` finds whatever is changed in it afterwards."""

from datetime import timedelta
from typing import Annotated, Any

import structlog
from pydantic import Field
from sqlalchemy.ext.asyncio import AsyncSession

from db.errors import SealsBroken
from db.ledger import chunk
from db.ledger.chunk import Receipt, Span
from db.ledger.seal import Seal, seal_next, was_sealed_before
from jobs._declaration import Outcome, Payload, chunked_job
from jobs._errors import Rejected
from jobs._run import ChunkedRun, ChunkEffect
from jobs._schedule import Schedule

HOURLY = Schedule(name="audit_sealing", cron="7 * * * *")
log = structlog.get_logger("bulwark.jobs")


class SealAudit(Payload):
    """A segment has about so many rows; one transaction is never in two."""

    segment_rows: Annotated[int, Field(ge=1, le=1_000_000)] = 100_000


@chunked_job(schedules=[HOURLY], timeout_s=12 * 3600, max_age=timedelta(days=1))
async def seal_audit(run: ChunkedRun, payload: SealAudit) -> Outcome:
    """Seal what is settled and is not sealed yet, a segment at a time, each in its transaction.

    The outcome counts what this run has sealed; the head is that of its last segment.
    """
    last = await run.read(lambda session: chunk.last_receipt(session, run.claim.job_id))
    number = 0 if last is None else last.chunk_no
    outcome: dict[str, Any] = {"segments": 0, "rows": 0, "head": None}
    while sealed := await _seal(run, payload, number := number + 1):
        outcome["segments"] += 1
        outcome["rows"] += sealed["rows"]
        outcome["head"] = sealed["head"]
        log.info(
            "audit.sealed",
            segment=sealed["segment"],
            head=sealed["head"],
            rows=sealed["rows"],
            signed=sealed["signed"],
        )
        if sealed["segment"] == 1 and await _was_sealed_before(run):
            log.warning(
                "audit.sealed_anew",
                head=sealed["head"],
                remedy="unless you began a new chain yourself, the seals were removed: run "
                "`bulwark audit verify` with --head and a head kept elsewhere",
            )
    return outcome


async def _was_sealed_before(run: ChunkedRun) -> bool:
    return await run.read(lambda session: was_sealed_before(session, run.claim))


async def _seal(run: ChunkedRun, payload: SealAudit, number: int) -> dict[str, Any]:
    """What the chunk's receipt tells of its segment; nothing where none was left to seal."""
    span = Span(1, 0, 0, 0, 1, 1)  # of no input: what is sealed has its verdicts already

    async def work(session: AsyncSession) -> ChunkEffect:
        made = await seal_next(session, payload.segment_rows, run.housekeeping.seal_keys)
        return ChunkEffect(Receipt(number, span, detail=_told(made)))

    try:
        receipt = await run.commit_chunk(number, span, work)
    except SealsBroken as error:
        raise Rejected(str(error)) from None
    return dict(receipt.detail or {})


def _told(made: Seal | None) -> dict[str, Any]:
    if made is None:
        return {}
    facts = {"segment": made.segment, "head": f"{made.segment}:{made.hash.hex()}"}
    return {**facts, "rows": made.rows, "signed": made.mac is not None}
