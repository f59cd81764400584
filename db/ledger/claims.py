"""Claims on many jobs of one kind, each its own, taken, fenced and ended by one statement for all.

What holds of one claim in `job.py` and `release.py` holds of each of these.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession

from db.errors import ClaimLost
from db.ledger.job import IS_CANCELLED, Claim, Reason, Ring, State, job
from db.ledger.limits import BRIEF, SET_LIMITS, Limits
from db.ledger.stored_json import JsonAsText

LOOK_AHEAD = 10
"""How many queued jobs are looked at, at most, for each that may come along."""


@dataclass(frozen=True)
class Taken:
    """What a claim of many has brought.

    `company` are the rings of jobs that were not heard of yet. `left` are jobs that were heard of
    and still wait: one that failed before, or that somebody was just changing.
    """

    claims: list[Claim]
    company: list[Ring]
    left: frozenset[UUID]


_uuids = ARRAY(sa.Uuid)
_READY = f"""job.state = 'queued' AND job.kind = :kind AND job.run_at <= now()
           AND job.attempt = 0 AND job.crashes = 0 AND NOT {IS_CANCELLED}"""
# Company is picked out of so many neighbours into an array of ids: joined to the table, they would
# be found by reading all of it where the planner takes the kind for a rare one.
_CLAIM_MANY = sa.text(
    f"""
    WITH limits AS MATERIALIZED (
        {SET_LIMITS}, set_config('synchronous_commit', 'off', true)
    ), me AS MATERIALIZED (
        SELECT worker.id FROM limits, bulwark.worker
         WHERE worker.id = :worker_id AND worker.ended_at IS NULL FOR KEY SHARE OF worker
    ), mine AS MATERIALIZED (
        SELECT id, array_position(:claim_ids, claim_id) AS place FROM bulwark.job
         WHERE state = 'running' AND worker_id = :worker_id AND claim_id = ANY (:claim_ids)
    ), heard AS MATERIALIZED (
        SELECT job.id FROM bulwark.job AS job
         WHERE job.id = ANY (:heard) AND {_READY} AND NOT EXISTS (SELECT FROM mine)
         ORDER BY job.id FOR UPDATE OF job SKIP LOCKED
    ), first AS (
        SELECT queue, priority FROM bulwark.job WHERE id = :first
    ), company AS MATERIALIZED (
        SELECT job.id FROM bulwark.job AS job
         WHERE job.id = ANY (ARRAY (
                   SELECT job.id
                     FROM first,
                          (SELECT * FROM bulwark.job WHERE state = 'queued' AND id > :first
                            ORDER BY id LIMIT :look_at) AS job
                    WHERE {_READY} AND job.queue = first.queue AND job.priority = first.priority
                      AND job.id <> ALL (:heard) AND NOT EXISTS (SELECT FROM mine)
                    LIMIT (SELECT cardinality(:claim_ids) - count(*) FROM heard)))
           AND {_READY}
         ORDER BY job.id FOR UPDATE OF job SKIP LOCKED
    ), chosen AS (
        SELECT id, row_number() OVER (ORDER BY id)::integer AS place
          FROM (SELECT id FROM heard UNION ALL SELECT id FROM company) AS new
         UNION ALL SELECT id, place FROM mine
    )
    UPDATE bulwark.job AS job
       SET state = 'running', reason = NULL, claim_id = (:claim_ids)[chosen.place],
           worker_id = me.id,
           claimed_at = CASE job.state WHEN 'running' THEN job.claimed_at ELSE now() END,
           started_at = coalesce(job.started_at, now()), next_ring_at = NULL
      FROM me, chosen
     WHERE job.id = chosen.id
    RETURNING job.id AS job_id, job.claim_id, job.worker_id, job.kind, job.payload::text AS payload,
              job.attempt, job.max_attempts, job.timeout_s, job.actor, job.correlation_id,
              job.crashes, extract(epoch FROM job.claimed_at - job.started_at)::float8 AS age_s,
              job.ring, job.queue, job.priority
    """
)
_CLAIM = _CLAIM_MANY.bindparams(
    sa.bindparam("claim_ids", type_=_uuids), sa.bindparam("heard", type_=_uuids)
).columns(payload=JsonAsText)


async def claim_many(
    session: AsyncSession,
    kind: str,
    heard: Sequence[UUID],
    claim_ids: Sequence[UUID],
    worker_id: UUID,
) -> Taken:
    """Take queued, due jobs of a kind for a live worker, by as many claims as there are ids.

    First those that were heard of, then, as far as the ids suffice, others of the queue and the
    priority of the first of them, in the order of their acceptance. A job that has failed before,
    or was present at a crash, is left out: it might take the others with it. Running it again with
    the same ids, after a lost answer, returns the same claims.
    """
    rows = await session.execute(
        _CLAIM,
        {
            "kind": kind,
            "heard": list(heard),
            "first": heard[0],
            "claim_ids": list(claim_ids),
            "worker_id": worker_id,
            "look_at": LOOK_AHEAD * len(claim_ids),
            **BRIEF.parameters,
        },
    )
    known = {*heard}
    claims, company = [], []
    for row in rows.mappings():
        fields = dict(row)
        number, queue, priority = (fields.pop(name) for name in ("ring", "queue", "priority"))
        claims.append(Claim(**fields))
        if fields["job_id"] not in known:
            company.append(Ring(fields["job_id"], number, kind, queue, priority))
    claims.sort(key=lambda one: one.job_id)
    unclaimed = known - {one.job_id for one in claims}
    return Taken(claims, company, await _still_waiting(session, unclaimed))


async def _still_waiting(session: AsyncSession, job_ids: set[UUID]) -> frozenset[UUID]:
    if not job_ids:
        return frozenset()
    waiting = sa.select(job.c.id).where(
        job.c.id.in_(job_ids), job.c.state == State.QUEUED, job.c.run_at <= sa.func.now()
    )
    return frozenset(await session.scalars(waiting))


def _these(claims: Sequence[Claim]) -> dict[str, list[UUID]]:
    return {
        "job_ids": [one.job_id for one in claims],
        "claim_ids": [one.claim_id for one in claims],
    }


_THESE = "unnest(:job_ids, :claim_ids) AS these (job_id, claim_id)"
_ARE_THESE = "job.id = these.job_id AND job.claim_id = these.claim_id"
_IDS = (sa.bindparam("job_ids", type_=_uuids), sa.bindparam("claim_ids", type_=_uuids))
_FENCE = sa.text(
    f"""
    WITH limits AS MATERIALIZED ({SET_LIMITS})
    SELECT job.id, {IS_CANCELLED} FROM limits, {_THESE}, bulwark.job AS job
     WHERE {_ARE_THESE} AND job.state = 'running'
     ORDER BY job.id FOR SHARE OF job
    """
).bindparams(*_IDS)


@dataclass(frozen=True)
class Fenced:
    """The jobs that claims still own: which may go on, and which were cancelled."""

    open: frozenset[UUID]
    cancelled: frozenset[UUID]


async def fence_many(session: AsyncSession, claims: Sequence[Claim], limits: Limits) -> Fenced:
    """Keep those of the jobs that these claims still own until the transaction ends.

    Nothing may be committed for those that are not open.
    """
    owned = (await session.execute(_FENCE, {**_these(claims), **limits.parameters})).all()
    return Fenced(
        frozenset(job_id for job_id, is_cancelled in owned if not is_cancelled),
        frozenset(job_id for job_id, is_cancelled in owned if is_cancelled),
    )


_LEFT_AS = sa.text(
    f"""
    SELECT job.id, job.state FROM {_THESE}, bulwark.job AS job
     WHERE {_ARE_THESE} AND job.state <> 'running'
    """
).bindparams(*_IDS)


async def left_as(session: AsyncSession, claims: Sequence[Claim]) -> dict[UUID, State]:
    """The states that these very claims left their jobs in, of those that are not open."""
    rows = await session.execute(_LEFT_AS, _these(claims))
    return {job_id: State(state) for job_id, state in rows}


@dataclass(frozen=True)
class End:
    """How one of many jobs ends: as it was asked for, or failed for a reason."""

    held: Claim
    state: State
    outcome: Mapping[str, Any] | None = None
    reason: Reason | None = None
    error: str | None = None


_TEXTS = ("states", "reasons", "errors", "outcomes")
_END = sa.text(
    f"""
    UPDATE bulwark.job AS job
       SET state = ended.state, reason = ended.reason, error = ended.error,
           outcome = ended.outcome::jsonb, finished_at = now(),
           attempt = job.attempt + CASE ended.state WHEN 'failed' THEN 1 ELSE 0 END
      FROM unnest(:job_ids, :claim_ids, :states, :reasons, :errors, :outcomes)
           AS ended (job_id, claim_id, state, reason, error, outcome)
     WHERE {_ARE_THESE.replace("these", "ended")} AND job.state = 'running'
    RETURNING job.id
    """
).bindparams(*_IDS, *(sa.bindparam(name, type_=ARRAY(sa.Text)) for name in _TEXTS))


async def end_many(session: AsyncSession, ends: Sequence[End]) -> None:
    """Write how the jobs ended. Raises ClaimLost when one of the claims no longer owns its job."""
    changed = await session.execute(
        _END,
        {
            **_these([one.held for one in ends]),
            "states": [one.state.value for one in ends],
            "reasons": [one.reason and one.reason.value for one in ends],
            "errors": [one.error for one in ends],
            "outcomes": [None if one.outcome is None else json.dumps(one.outcome) for one in ends],
        },
    )
    if len(changed.all()) != len(ends):
        raise ClaimLost


_GIVE_BACK = sa.text(
    f"""
    WITH limits AS MATERIALIZED ({SET_LIMITS})
    UPDATE bulwark.job AS job
       SET state = 'queued', reason = 'given_back', error = NULL, run_at = now(),
           queued_at = now(), next_ring_at = now()
      FROM limits, {_THESE}
     WHERE {_ARE_THESE} AND job.state = 'running'
    RETURNING job.id
    """
).bindparams(*_IDS)


async def give_back_many(session: AsyncSession, claims: Sequence[Claim]) -> set[UUID]:
    """Put the jobs that these claims own back into their queues, due at once.

    Returns them, also those that the same claims put back before, when the answer was lost.
    """
    await session.execute(_GIVE_BACK, {**_these(claims), **BRIEF.parameters})
    left = await left_as(session, claims)
    return {job_id for job_id, state in left.items() if state == State.QUEUED}
