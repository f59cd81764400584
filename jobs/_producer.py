"""Enqueueing: the job row first, in PostgreSQL, and after its commit a ring in Redis."""

import asyncio
import json
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

import structlog
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError
from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from uuid6 import uuid7

from db.errors import QueueTooDeep
from db.ledger import ring
from db.ledger.acceptance import insert_jobs
from db.ledger.job import Ring
from db.retry import DATABASE_ERRORS
from db.transaction import ANSWER_TIMEOUT_S, look, transaction
from jobs._after_commit import after_commit
from jobs._bell import Bell
from jobs._declaration import Payload, complaint
from jobs._discovery import Jobs
from jobs._errors import JobError, PayloadTooLarge, QueueFull
from jobs._idempotency import digest_of, keep_keys

MAX_PAYLOAD_BYTES = 1024 * 1024
MAX_TEXT_BYTES = 500
JOBS_AT_ONCE = 1000
"""For how many jobs PostgreSQL has ANSWER_TIMEOUT_S; for more it has as many times that."""
RING_TIMEOUT_S = 2.0
"""How long an enqueue may wait for Redis: its jobs are accepted, and the relay will ring them."""
RING_TIMEOUTS = 5
"""So many times that long at most, where more than JOBS_AT_ONCE are rung."""
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
T = TypeVar("T")
log = structlog.get_logger("bulwark.producer")


def new_job_id() -> UUID:
    """A fresh UUIDv7: job ids sort by the time they were made."""
    return UUID(int=uuid7().int)


@dataclass(frozen=True)
class Enqueued:
    """An accepted job; `created` is false when the idempotency key had accepted it before."""

    job_id: UUID
    created: bool


@dataclass(frozen=True)
class Terms:
    """On which terms a job is enqueued; None leaves it to the job's declaration.

    `attempts` is how often it may fail, `timeout_s` the seconds that one run may take; a higher
    `priority`, from -9 to 9, runs first.
    """

    run_at: datetime | None = None
    queue: str | None = None
    priority: int | None = None
    attempts: int | None = None
    timeout_s: int | None = None
    actor: str | None = None
    correlation_id: str | None = None

    def __post_init__(self) -> None:
        if self.run_at is not None and self.run_at.tzinfo is None:
            raise JobError(f"run_at {self.run_at} has no time zone; give one")
        if self.run_at is not None and not _is_in_calendar(self.run_at):
            raise JobError(f"run_at {self.run_at.isoformat()} is outside the years 1 to 9999")
        if problem := complaint(vars(self)):
            raise JobError(problem)
        for name in ("actor", "correlation_id"):
            _check_text(name, getattr(self, name))


def _is_in_calendar(at: datetime) -> bool:
    try:
        at.astimezone(UTC)
    except OverflowError:
        return False
    return True


class Producer:
    """Accepts jobs. Without a bell the relay of a worker rings them within a second.

    One that does not heed the depth limits of queues is for what the system itself enqueues.
    """

    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        jobs: Jobs,
        bell: Bell | None = None,
        *,
        idempotency_retention: timedelta = timedelta(days=7),
        heeds_depth: bool = True,
    ) -> None:
        self._sessions = sessions
        self._jobs = jobs
        self._bell = bell
        self._retention = idempotency_retention
        self._heeds_depth = heeds_depth

    async def enqueue(
        self,
        payload: Payload,
        *,
        session: AsyncSession | None = None,
        idempotency_key: str | None = None,
        job_id: UUID | None = None,
        run_at: datetime | None = None,
        queue: str | None = None,
        priority: int | None = None,
        attempts: int | None = None,
        timeout_s: int | None = None,
        actor: str | None = None,
        correlation_id: str | None = None,
    ) -> Enqueued:
        """Accept one job.

        With the caller's own `session` the row is part of the caller's transaction, and the ring
        goes out when, and only when, that commits. Otherwise the job is accepted on return; a key
        that an open transaction is taking is waited for, and after some tries that end as on a
        lost connection the error is raised.
        Raises PayloadTooLarge, IdempotencyConflict, UnknownJob, QueueFull.
        """
        terms = Terms(run_at, queue, priority, attempts, timeout_s, actor, correlation_id)
        keys = None if idempotency_key is None else [idempotency_key]
        return (await self._enqueue([payload], session, keys, terms, job_id))[0]

    async def enqueue_many(
        self,
        payloads: Sequence[Payload],
        *,
        session: AsyncSession | None = None,
        idempotency_keys: Sequence[str] | None = None,
        run_at: datetime | None = None,
        queue: str | None = None,
        priority: int | None = None,
        attempts: int | None = None,
        timeout_s: int | None = None,
        actor: str | None = None,
        correlation_id: str | None = None,
    ) -> list[Enqueued]:
        """Accept many jobs, all or none, in one statement and one pipeline; see `enqueue`."""
        terms = Terms(run_at, queue, priority, attempts, timeout_s, actor, correlation_id)
        return await self._enqueue(payloads, session, idempotency_keys, terms)

    async def _enqueue(
        self,
        payloads: Sequence[Payload],
        session: AsyncSession | None,
        keys: Sequence[str] | None,
        terms: Terms,
        job_id: UUID | None = None,
    ) -> list[Enqueued]:
        if keys is not None and len(keys) != len(payloads):
            raise JobError(f"{len(payloads)} payloads came with {len(keys)} idempotency keys")
        for key in keys or ():
            _check_text("idempotency key", key)
        rows = [self._row(payload, terms) for payload in payloads]
        if not rows:
            return []
        if job_id is not None:
            rows[0]["id"] = job_id
        if session is not None:
            return await self._accept_within(session, rows, keys, terms.run_at)
        return await self.in_transaction(
            lambda own: self._accept(own, rows, keys, terms.run_at),
            try_within_s=ANSWER_TIMEOUT_S * math.ceil(len(rows) / JOBS_AT_ONCE),
        )

    async def in_transaction(
        self, work: Callable[[AsyncSession], Awaitable[T]], *, try_within_s: float | None = None
    ) -> T:
        """Run work that enqueues with the given session, in a transaction of its own.

        The work may run more than once; ids that it must not change it has to make before. A try
        that takes longer than `try_within_s` is given up as on a lost connection.
        """
        return await transaction(
            self._sessions,
            work,
            name="job.enqueue",
            receipted=True,
            try_within_s=try_within_s,
        )

    def _row(self, payload: Payload, terms: Terms) -> dict[str, Any]:
        declared = self._jobs.of(payload)
        defaults = declared.defaults
        return {
            "id": new_job_id(),
            "kind": declared.kind,
            "payload": _to_json(payload, declared.kind),
            "digest": digest_of(payload, declared.kind),
            "queue": _given(terms.queue, defaults.queue),
            "priority": _given(terms.priority, defaults.priority),
            "max_attempts": _given(terms.attempts, defaults.max_attempts),
            "timeout_s": _given(terms.timeout_s, defaults.timeout_s),
            "actor": terms.actor,
            "correlation_id": terms.correlation_id,
        }

    async def _accept_within(
        self,
        session: AsyncSession,
        rows: list[dict[str, Any]],
        keys: Sequence[str] | None,
        run_at: datetime | None,
    ) -> list[Enqueued]:
        """Accept in the caller's transaction, and leave no key there when one is in conflict."""
        if keys is None:
            return await self._accept(session, rows, keys, run_at)
        async with session.begin_nested():
            return await self._accept(session, rows, keys, run_at)

    async def _accept(
        self,
        session: AsyncSession,
        rows: list[dict[str, Any]],
        keys: Sequence[str] | None,
        run_at: datetime | None,
    ) -> list[Enqueued]:
        accepted = [Enqueued(row["id"], True) for row in rows]
        if keys is not None:
            kept = await keep_keys(session, self._jobs, rows, keys, self._retention)
            accepted = [
                Enqueued(job_id, job_id == row["id"])
                for row, job_id in zip(rows, kept, strict=True)
            ]
        ids = {one.job_id for one in accepted if one.created}
        new = [row for row in rows if row["id"] in ids]
        try:
            rings = await insert_jobs(
                session, new, run_at, rung=self._bell is not None, heeds_depth=self._heeds_depth
            )
        except QueueTooDeep as full:
            raise QueueFull(
                f"the queue {full.queue} holds {_at_least(full)} jobs and {full.most:,} may wait "
                "there; enqueue later, when workers have caught up, or let more wait with "
                "`bulwark limit`"
            ) from None
        after_commit(session, lambda: self._ring(rings))
        return accepted

    async def _ring(self, rings: Sequence[Ring]) -> None:
        if self._bell is None:
            return
        timeout_s = RING_TIMEOUT_S * min(math.ceil(len(rings) / JOBS_AT_ONCE), RING_TIMEOUTS)
        try:
            async with asyncio.timeout(timeout_s):
                await self._bell.ring(rings)
        except (RedisError, OSError) as error:
            reason = str(error) or f"no answer within {timeout_s} s"
            log.warning("ring.failed", jobs=len(rings), reason=reason, remedy="the relay rings")
            await self._leave_to_relay(rings)

    async def _leave_to_relay(self, rings: Sequence[Ring]) -> None:
        """Have the relay ring at once; should PostgreSQL not take that, it rings a little later."""
        job_ids = {one.job_id for one in rings}
        with suppress(*DATABASE_ERRORS):
            async with asyncio.timeout(RING_TIMEOUT_S):
                await look(self._sessions, lambda session: ring.ring_again(session, job_ids))


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def _check_text(name: str, value: str | None) -> None:
    if value is None:
        return
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise JobError(f"the {name} is not valid Unicode; mend it") from None
    if not 1 <= size <= MAX_TEXT_BYTES or "\0" in value:
        raise JobError(f"the {name} must have 1 to {MAX_TEXT_BYTES} bytes, and no NUL among them")


def _to_json(payload: Payload, kind: str) -> str:
    """The payload as its row will hold it. Raises JobError when a worker could not read it back."""
    try:
        text = payload.model_dump_json(by_alias=True, round_trip=True)
    except PydanticSerializationError:
        raise JobError(
            f"the payload of {kind} cannot be written as JSON; use text that is valid Unicode, "
            "and types that JSON knows"
        ) from None
    if (size := len(text.encode())) > MAX_PAYLOAD_BYTES:
        raise PayloadTooLarge(
            f"the payload of {kind} has {size:,} bytes, more than "
            f"{MAX_PAYLOAD_BYTES:,}; put the rows in a file and import that"
        )
    if _NUL.search(text):
        raise JobError(f"the payload of {kind} holds a NUL, which PostgreSQL cannot; remove it")
    if changed := _changed_by_json(payload, text):
        raise JobError(
            f"the payload of {kind} would reach the worker with another {', '.join(changed)}; "
            "give it values that JSON can carry (NaN, infinity and secrets it cannot)"
        )
    return text


def _changed_by_json(payload: Payload, text: str) -> list[str]:
    """The fields that the worker would read otherwise, or could not read."""
    try:
        back = type(payload).model_validate(json.loads(text))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        return sorted({str(one["loc"][0]) if one["loc"] else "content" for one in problems})
    return [
        name for name in type(payload).model_fields if getattr(back, name) != getattr(payload, name)
    ]


def _at_least(full: QueueTooDeep) -> str:
    """How many wait; they are counted only as far as they may."""
    return f"{full.waiting:,}" + (" or more" if full.waiting >= full.most else "")
