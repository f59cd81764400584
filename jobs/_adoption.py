"""Messages of plain arq clients: read, and made jobs. Nothing is ever unpickled."""

import hashlib
import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from db.columns import BIGINT_MAX
from db.ledger.adoption import adopt
from db.ledger.parked import Reason
from db.retry import sqlstate
from jobs._bell import VERSION, deserialize
from jobs._discovery import Jobs
from jobs._errors import Unadoptable
from jobs._producer import MAX_PAYLOAD_BYTES, new_job_id

MAX_ID_CHARS = 500
_PICKLE_PROTOCOL = b"\x80"
_UNSTORABLE_CLASSES = ("22", "54")
"""SQLSTATE classes of values that PostgreSQL cannot hold: a NUL, JSON that is nested too deep."""


async def adopt_message(
    session: AsyncSession,
    jobs: Jobs,
    queue: str,
    arq_id: str,
    content: bytes | None,
    ring_after: timedelta,
) -> UUID:
    """Make a message a job, once, and return the job's id. Raises Unadoptable with the reason.

    The payload is not looked at: one that does not fit fails as a job, where it is seen.
    """
    row = {**_read(jobs, content), "queue": queue, "arq_id": arq_id}
    try:
        return await adopt(session, row, ring_after)
    except DBAPIError as error:
        if (sqlstate(error) or "")[:2] in _UNSTORABLE_CLASSES:
            raise Unadoptable(Reason.UNSTORABLE, row["kind"]) from None
        raise


def _read(jobs: Jobs, content: bytes | None) -> dict[str, Any]:
    """The columns of the job that a message asks for."""
    message = _deserialize(content)
    kind, enqueued_ms = message.get("f"), message.get("et")
    if not isinstance(kind, str):
        raise Unadoptable(Reason.UNREADABLE)
    if not (isinstance(enqueued_ms, int) and 0 <= enqueued_ms <= BIGINT_MAX):
        raise Unadoptable(Reason.UNREADABLE, kind)
    if kind not in jobs:
        raise Unadoptable(Reason.UNKNOWN_JOB, kind)
    defaults = jobs[kind].defaults
    return {
        "id": new_job_id(),
        "kind": kind,
        "payload": _payload(message, kind),
        "priority": defaults.priority,
        "max_attempts": defaults.max_attempts,
        "timeout_s": defaults.timeout_s,
        "arq_enqueued_ms": enqueued_ms,
    }


def _deserialize(content: bytes | None) -> Mapping[str, Any]:
    if content is None:
        raise Unadoptable(Reason.GONE)
    if content[:1] != VERSION:
        is_pickle = content[:1] == _PICKLE_PROTOCOL
        raise Unadoptable(Reason.PICKLE if is_pickle else Reason.UNREADABLE)
    try:
        return deserialize(content)
    except (ValueError, RecursionError):
        raise Unadoptable(Reason.UNREADABLE) from None


def _payload(message: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """One object as the only argument, or keyword arguments."""
    arguments, payload = message.get("a"), message.get("k")
    if payload == {} and isinstance(arguments, list) and len(arguments) == 1:
        arguments, payload = [], arguments[0]
    if arguments != [] or not isinstance(payload, dict):
        raise Unadoptable(Reason.BAD_ARGUMENTS, kind)
    try:
        text = json.dumps(payload, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise Unadoptable(Reason.UNSTORABLE, kind) from None
    if len(text) > MAX_PAYLOAD_BYTES:
        raise Unadoptable(Reason.TOO_LARGE, kind)
    return payload


def printable(text: bytes) -> str:
    """An arq id, or the name of a function, as PostgreSQL can hold and index it."""
    shown = text.decode(errors="backslashreplace").replace("\0", "\\x00")
    return shown if len(shown) <= MAX_ID_CHARS else f"sha256:{hashlib.sha256(text).hexdigest()}"
