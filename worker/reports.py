"""What the ledger says about jobs, as the reading commands and the demo show it."""

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger import chunk
from db.ledger.chunk import Tally
from db.ledger.job import ENDED, State, job
from db.ledger.verdict import RowVerdict, read_verdicts
from db.retry import DATABASE_ERRORS, Fault, classify
from worker.connection import Sessions
from worker.exit_codes import BadInput

LEAST_ID_CHARS = 8
PAGE_ROWS = 1000


@dataclass(frozen=True)
class JobReport:
    """One job at one moment, by PostgreSQL's clock.

    `live_workers` serve its queue; `silent_s` is how long the worker that holds it has said
    nothing. `uncommitted_rows` and `uncommitted_bytes` are how far an atomic job says that it is,
    which proves nothing. `input_bytes` is the whole of its input, if that is known. `reached_end`
    says that its receipts cover all of that input, as those of a job that succeeded do. `pause` is
    what it says that it waits for.
    """

    id: UUID
    kind: str
    queue: str
    priority: int
    state: State
    reason: str | None
    error: str | None
    outcome: Mapping[str, Any] | None
    attempt: int
    max_attempts: int
    timeout_s: int
    crashes: int
    worker_id: UUID | None
    actor: str | None
    correlation_id: str | None
    created_at: datetime
    run_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    table_name: str | None
    source: str | None
    input_bytes: int | None
    reached_end: bool
    live_workers: int
    silent_s: float | None
    uncommitted_rows: int | None
    uncommitted_bytes: int | None
    pause: str | None
    read_at: datetime
    tally: Tally

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def run_s(self) -> float | None:
        """Seconds from the first start to the end, or until now."""
        if self.started_at is None:
            return None
        return ((self.finished_at or self.read_at) - self.started_at).total_seconds()

    @property
    def rows_per_s(self) -> float | None:
        return self.tally.rows / self.run_s if self.run_s else None

    @property
    def counted(self) -> int:
        """All rows that have a verdict, and those that the job was told to leave out."""
        return sum(self.tally.counts.values()) + self.tally.filtered

    @property
    def adds_up(self) -> bool:
        """Whether every row of the input, to its end, has a verdict or was left out."""
        return self.reached_end and self.counted == self.tally.rows

    @property
    def unread_bytes(self) -> int | None:
        """How much of the input no receipt covers; None when its size is not known."""
        return None if self.input_bytes is None else self.input_bytes - self.tally.bytes

    def as_json(self) -> dict[str, Any]:
        """The document that `--json` promises."""
        fields = asdict(self)
        job_id, _, _ = (fields.pop(name) for name in ("id", "tally", "read_at"))
        return {
            "job_id": job_id,
            **fields,
            "run_s": self.run_s,
            "rows_per_s": self.rows_per_s,
            "rows_read": self.tally.rows,
            "rows_not_selected": self.tally.filtered,
            "verdicts": dict(self.tally.counts),
            "adds_up": self.adds_up,
            "chunks": self.tally.chunks,
            "done_bytes": self.tally.bytes,
        }


# A payload may hold anything, if it was written by SQL: what is no size in it is none here.
# Who names a table has an input, be it keys or a filter, before a receipt says how large it is.
# Blank lines at the end belong to no receipt, so a receipt of nothing but rows not reached, which
# closes a failed job, counts as the end of the input too.
_REPORT = sa.text(
    """
    SELECT job.id, job.kind, job.queue, job.priority, job.state, job.reason, job.error,
           job.outcome, job.attempt, job.max_attempts, job.timeout_s, job.crashes,
           job.worker_id, job.actor, job.correlation_id, job.created_at, job.run_at,
           job.started_at, job.finished_at, input ->> 'table' AS table_name,
           input ->> 'name' AS source,
           coalesce((opening.detail ->> 'text_bytes')::bigint,
                    CASE WHEN input ->> 'text_bytes' ~ '^[0-9]{1,18}$'
                         THEN (input ->> 'text_bytes')::bigint END) AS input_bytes,
           job.state = 'succeeded'
              OR job.state = 'failed' AND coalesce(job.outcome ? 'verdicts', false)
              OR NOT (
               coalesce(opening.detail ? 'text_bytes', false)
               OR (input ->> 'is_given')::boolean OR input ->> 'table' IS NOT NULL
           ) OR coalesce(
               latest.end_byte >= (opening.detail ->> 'text_bytes')::bigint
               OR (latest.counts ? 'not_reached' AND latest.counts - 'not_reached' = '{}'), false
           ) AS reached_end,
           (SELECT count(*) FROM bulwark.worker
             WHERE ended_at IS NULL AND job.queue = ANY (queues)
               AND seen_at > now() - make_interval(secs => :lost_after_s)) AS live_workers,
           CASE WHEN job.state = 'running'
                THEN extract(epoch FROM now() - holder.seen_at)::float8 END AS silent_s,
           CASE WHEN ahead.note IS NULL THEN ahead.rows END AS uncommitted_rows,
           CASE WHEN ahead.note IS NULL THEN ahead.bytes END AS uncommitted_bytes,
           ahead.note AS pause,
           now() AS read_at
      FROM bulwark.job AS job
     CROSS JOIN LATERAL bulwark.input_of(job.id) AS input
      LEFT JOIN bulwark.progress AS ahead
             ON ahead.job_id = job.id AND ahead.claim_id = job.claim_id AND job.state = 'running'
      LEFT JOIN bulwark.worker AS holder ON holder.id = job.worker_id
      LEFT JOIN bulwark.chunk AS opening ON opening.job_id = job.id AND opening.chunk_no = :opening
      LEFT JOIN LATERAL (SELECT end_byte, counts FROM bulwark.chunk
                          WHERE job_id = job.id ORDER BY chunk_no DESC LIMIT 1) AS latest ON true
     WHERE job.id = :job_id
    """
).columns(outcome=JSONB)


async def read_job(session: AsyncSession, job_id: UUID, lost_after_s: float) -> JobReport:
    """Read one job. Raises BadInput when it is not there."""
    parameters = {"job_id": job_id, "lost_after_s": lost_after_s, "opening": chunk.OPENING}
    row = (await session.execute(_REPORT, parameters)).mappings().one_or_none()
    if row is None:
        raise BadInput(f"There is no job {job_id}: see `bulwark jobs`.")
    fields = {**row, "state": State(row["state"])}
    tally = await chunk.tally(session, job_id)
    return JobReport(**fields, tally=_with_verdicts_of(tally, row["outcome"]))


def _with_verdicts_of(tally: Tally, outcome: Mapping[str, Any] | None) -> Tally:
    """A job of one transaction has no receipts, and reports its verdicts in its outcome."""
    said = (outcome or {}).get("verdicts")
    if tally.counts or not isinstance(said, dict):
        return tally
    counts = {name: count for name, count in said.items() if type(count) is int}
    return replace(tally, rows=sum(counts.values()), counts=counts)


async def find_job(session: AsyncSession, text: str) -> UUID:
    """The job whose id is, begins or ends so. Raises BadInput unless it is exactly one."""
    digits = text.replace("-", "").lower()
    if not re.fullmatch(rf"[0-9a-f]{{{LEAST_ID_CHARS},32}}", digits):
        raise BadInput(
            f"{text!r} is no job id: give one, or {LEAST_ID_CHARS} or more of its first or last "
            "characters, as `bulwark jobs` shows them."
        )
    if len(digits) == 32:
        return UUID(digits)
    id_digits = sa.func.replace(sa.cast(job.c.id, sa.Text), "-", "")
    matches = id_digits.startswith(digits) | id_digits.endswith(digits)
    query = sa.select(job.c.id).where(matches).limit(2)
    found: list[UUID] = list(await session.scalars(query))
    if len(found) != 1:
        many = "Several jobs have" if found else "No job has"
        raise BadInput(f"{many} an id that begins or ends with {text!r}: see `bulwark jobs`.")
    return found[0]


_LIST = sa.text(
    """
    SELECT job.id AS job_id, job.kind, job.queue, job.state, job.reason, job.error, job.attempt,
           bulwark.input_of(job.id) ->> 'table' AS table_name, job.created_at, job.run_at,
           job.started_at, job.finished_at,
           extract(epoch FROM coalesce(job.finished_at, now()) - job.started_at)::float8 AS run_s,
           coalesce(done.rows_read, said.rows_read, 0) AS rows_read,
           coalesce(done.rejected, said.rejected, 0) AS rejected
      FROM (SELECT id, kind, queue, state, reason, error, attempt, created_at, run_at, started_at,
                   finished_at, outcome
              FROM bulwark.job
             WHERE (CAST(:state AS text) IS NULL OR state = :state)
               AND (CAST(:queue AS text) IS NULL OR queue = :queue)
             ORDER BY id DESC LIMIT :most) AS job
     CROSS JOIN LATERAL (
           SELECT sum(rows)::bigint AS rows_read,
                  sum((counts ->> 'rejected')::bigint)::bigint AS rejected
             FROM bulwark.chunk WHERE job_id = job.id) AS done
     CROSS JOIN LATERAL (
           SELECT sum(value::bigint)::bigint AS rows_read,
                  sum(value::bigint) FILTER (WHERE key = 'rejected')::bigint AS rejected
             FROM jsonb_each(CASE jsonb_typeof(job.outcome -> 'verdicts')
                             WHEN 'object' THEN job.outcome -> 'verdicts' END)
            WHERE jsonb_typeof(value) = 'number') AS said
     ORDER BY job.id DESC
    """
)


async def list_jobs(
    session: AsyncSession, *, state: State | None, queue: str | None, most: int
) -> list[dict[str, Any]]:
    """The newest jobs first."""
    parameters = {"state": state and state.value, "queue": queue, "most": most}
    return [dict(row) for row in (await session.execute(_LIST, parameters)).mappings()]


async def each_verdict(
    sessions: Sessions, job_id: UUID, most: int | None = None, *, with_raw: bool = True
) -> AsyncGenerator[RowVerdict, None]:
    """The rows that need a look, in input order, read a page at a time.

    Their bytes are read only if asked for, since not every role may.
    """
    after_row = 0
    while most is None or most > 0:
        wanted = PAGE_ROWS if most is None else min(PAGE_ROWS, most)
        async with sessions() as session:
            page = await read_verdicts(
                session, job_id, after_row=after_row, most=wanted, with_raw=with_raw
            )
        for one in page:
            yield one
        if len(page) < wanted:
            return
        after_row = page[-1].row_no
        most = None if most is None else most - len(page)


async def watch(
    sessions: Sessions, job_id: UUID, lost_after_s: float, interval_s: float
) -> AsyncGenerator[JobReport, None]:
    """Report on a job again and again; the report of its end is the last.

    While PostgreSQL is away there is none.
    """
    while True:
        try:
            async with sessions() as session:
                report = await read_job(session, job_id, lost_after_s)
        except DATABASE_ERRORS as error:
            if classify(error) is not Fault.OUTAGE:
                raise
        else:
            yield report
            if report.ended:
                return
        await asyncio.sleep(interval_s)  # the caller's pace; the ledger sends no news
