"""Which job an idempotency key leads to, and which payloads are the same."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger import idempotency
from db.ledger.idempotency import Key
from jobs._declaration import Payload
from jobs._discovery import Jobs
from jobs._errors import IdempotencyConflict

DIGEST_BYTES = hashlib.sha256().digest_size
"""That of a key which SQL has taken is longer: it is of the payload as it was given."""


def digest_of(payload: Payload, kind: str) -> bytes:
    """What tells payloads apart; neither the order of names does, nor a default left as it is."""
    text = payload.model_dump_json(exclude_defaults=True, by_alias=True, round_trip=True)
    content = json.dumps(json.loads(text), sort_keys=True)
    return hashlib.sha256(f"{kind}\n{content}".encode()).digest()


async def keep_keys(
    session: AsyncSession,
    jobs: Jobs,
    rows: Sequence[Mapping[str, Any]],
    keys: Sequence[str],
    retention: timedelta,
) -> list[UUID]:
    """Take a key for each row, by its id and digest; returns the jobs to which the keys lead.

    Raises IdempotencyConflict when one leads to a job with another payload.
    """
    wanted: dict[str, Key] = {}
    for row, key in zip(rows, keys, strict=True):
        digest = row["digest"]
        if wanted.setdefault(key, Key(key, row["id"], digest)).digest != digest:
            raise IdempotencyConflict(
                f"idempotency key {key!r} stands beside two different payloads; use a new key"
            )
    kept = await idempotency.keep_keys(session, list(wanted.values()), retention)
    kept |= await _judged_here(session, jobs, kept)
    for key, one in wanted.items():
        if kept[key].digest != one.digest:
            raise IdempotencyConflict(
                f"idempotency key {key!r} was used with another payload, by job "
                f"{kept[key].job_id}; use a new key"
            )
    return [kept[key].job_id for key in keys]


async def _judged_here(
    session: AsyncSession, jobs: Jobs, kept: Mapping[str, Key]
) -> dict[str, Key]:
    """The keys that SQL has taken, with the digests that their payloads have here."""
    foreign = [key for key, one in kept.items() if len(one.digest) != DIGEST_BYTES]
    if not foreign:
        return {}
    found = await idempotency.jobs_behind(session, foreign)
    return {
        key: replace(kept[key], digest=digest)
        for key, (kind, payload) in found.items()
        if (digest := _digest_of_stored(jobs, kind, payload)) is not None
    }


def _digest_of_stored(jobs: Jobs, kind: str, payload: dict[str, Any]) -> bytes | None:
    """None where no payload of this producer could be the same."""
    if kind not in jobs:
        return None
    try:
        return digest_of(jobs[kind].payload.model_validate(payload), kind)
    except ValidationError:
        return None
