"""Going through all segments of the audit, one at a time, for `bulwark audit verify`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from db.ledger.seal import Seal, hash_rotations, read_blocks, read_seals
from db.ledger.seal_chain import Chain
from db.ledger.seal_check import (
    Fault,
    Findings,
    check_rows,
    count_unsealed,
    rotated_months,
    segments_of,
)
from worker.connection import Sessions

PAGE_SEALS = 1_000


@dataclass(frozen=True)
class Verification:
    """What was looked at, and what was found."""

    segments: int
    head: str | None
    signed_from: int | None
    signatures_checked: bool
    unsealed: int
    rotations: Sequence[Mapping[str, Any]]
    findings: Findings

    @property
    def is_whole(self) -> bool:
        return not self.findings.faults

    def as_json(self) -> dict[str, Any]:
        """The document that `--json` promises."""
        return {
            "whole": self.is_whole,
            "segments": self.segments,
            "head": self.head,
            "signed_from": self.signed_from,
            "signatures_checked": self.signatures_checked,
            "rows": self.findings.rows,
            "rotated_rows": self.findings.rotated,
            "unsealed_rows": self.unsealed,
            "rotations": [dict(one) for one in self.rotations],
            "faults": [_fault_as_json(one) for one in self.findings.faults],
            "untold_faults": self.findings.untold,
        }


def _fault_as_json(one: Fault) -> dict[str, Any]:
    return {
        "kind": one.kind.value,
        "segment": one.segment,
        "job_id": None if one.key is None else one.key.job_id,
        "chunk": None if one.key is None else one.key.chunk_no,
        "entry": None if one.key is None else one.key.entry_no,
        "rows": one.rows,
        "detail": one.detail,
    }


async def verify(
    sessions: Sessions, keys: Sequence[str], heads: Mapping[int, str], job_id: UUID | None = None
) -> Verification:
    """Check the whole chain of seals, and the rows of all segments or of those with the job's.

    Each segment is read by itself, so that no snapshot is held for long.
    """
    chain, findings, segments = Chain(keys, heads), Findings(), 0
    wanted = None
    if job_id is not None:
        async with sessions() as session:
            wanted = await segments_of(session, job_id)
    behind = 0
    while page := await _page(sessions, behind):
        for one in page:
            with_rows = wanted is None or one.segment in wanted
            await _check(sessions, chain, one, findings, with_rows=with_rows)
        segments += len(page)
        behind = page[-1].segment
    for fault in chain.end():
        findings.add(fault)
    async with sessions() as session:
        unsealed = await count_unsealed(session, chain.last, findings)
        rotations = await rotated_months(session)
    last = chain.last
    return Verification(
        segments,
        None if last is None else f"{last.segment}:{last.hash.hex()}",
        chain.signed_from,
        bool(keys) and chain.signed_from is not None,
        unsealed,
        rotations,
        findings,
    )


async def _page(sessions: Sessions, behind: int) -> list[Seal]:
    async with sessions() as session:
        return await read_seals(session, behind, PAGE_SEALS)


async def _check(
    sessions: Sessions, chain: Chain, one: Seal, findings: Findings, *, with_rows: bool
) -> None:
    async with sessions() as session:
        blocks = await read_blocks(session, one.segment)
        for fault in chain.link(one, blocks, await hash_rotations(session, one)):
            findings.add(fault)
        if with_rows:
            await check_rows(session, one, blocks, findings)
