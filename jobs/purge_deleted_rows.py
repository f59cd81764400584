"""Remove for good what was deleted softly and is past its retention, referencing tables first."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Annotated, Any

from pydantic import Field, field_validator
from sqlalchemy.ext.asyncio import AsyncSession

from db.catalog import read_facts
from db.due_rows import DueRows, in_groups, read_cutoffs, soft_deleted
from db.errors import UnknownModel
from db.ledger import chunk
from db.ledger.chunk import OPENING
from db.purge_trial import Trial, count_removable, take_snapshot
from db.registry import Registry
from jobs._archive import MANIFEST, Archive
from jobs._archive_format import ArchiveFormat
from jobs._archive_place import below
from jobs._declaration import Outcome, Payload, chunked_job
from jobs._errors import Rejected
from jobs._pace import Pace
from jobs._pauses import Pauses
from jobs._purging import Purging, open_purge, steps
from jobs._retention import retentions
from jobs._run import ChunkedRun
from jobs._schedule import Schedule
from jobs._window import Until

Days = Annotated[int, Field(ge=0, le=36_500)]


class PurgeDeletedRows(Payload):
    """What to remove, how much of it, how fast, and what to keep a copy of.

    Without `tables` all are purged that have a retention; `retention_days` comes before that of the
    settings. `dry_run` counts what would go, and changes nothing. `max_rows` is the most that goes,
    over all tables. `archive` is a folder or the URI of one, in which the rows are written before
    they go. `until` is a local time and its zone: the purge stops then, and goes on at the time of
    the day at which it began. A batch takes about `target_s`, beginning with `batch_rows`. It
    pauses while a replica is more than `most_lag_mib` behind.
    """

    tables: list[str] | None = None
    retention_days: dict[str, Days] = {}
    dry_run: bool = False
    max_rows: Annotated[int, Field(ge=1)] | None = None
    archive: str | None = None
    archive_format: ArchiveFormat = "ndjson"
    until: str | None = None
    batch_rows: Annotated[int, Field(ge=1, le=100_000)] = 5_000
    target_s: Annotated[float, Field(gt=0, le=60)] = 0.5
    most_lag_mib: Annotated[int, Field(ge=0)] | None = 256

    @field_validator("until")
    @classmethod
    def _is_a_time(cls, text: str | None) -> str | None:
        if text is not None:
            Until.parse(text)
        return text


async def write_manifest(run: ChunkedRun, payload: PurgeDeletedRows) -> None:
    """Say in the archive of a purge that failed what was committed of it."""
    opening = await run.read(lambda s: chunk.read_receipt(s, run.claim.job_id, OPENING))
    if opening is not None and (archive := await _archive(run, payload)) is not None:
        await _close(run, archive)


NIGHTLY = Schedule(name="nightly_purge", cron="15 2 * * *", off_until="retention_days")


@chunked_job(
    write_manifest,
    schedules=[NIGHTLY],
    timeout_s=24 * 3600,
    max_age=timedelta(days=30),
)
async def purge_deleted_rows(run: ChunkedRun, payload: PurgeDeletedRows) -> Outcome:
    """Remove what is due, batch by batch; a run after an interruption goes on behind the last one.

    What is due is fixed when the job begins. A row that something still refers to is kept.
    """
    kept_days = run.housekeeping.retention_days
    retention = retentions(run.models, payload.tables, kept_days, payload.retention_days)
    archive = await _archive(run, payload)
    if payload.dry_run:
        return _foreseen(await run.read(lambda s: _try(s, run.models, retention, payload)))
    opening = await open_purge(run, retention)
    due = await run.read(lambda session: _due(session, run.models, opening["cutoffs"]))
    purging = Purging(
        run,
        steps(in_groups(due)),
        Pauses(
            run,
            datetime.fromisoformat(opening["began"]),
            None if payload.until is None else Until.parse(payload.until),
            payload.most_lag_mib,
        ),
        Pace(payload.batch_rows, payload.target_s),
        archive,
        payload.max_rows,
    )
    capped = await purging.go_on()
    if archive is not None:
        await _close(run, archive)
    return await _done(run, archive, capped=capped)


async def _archive(run: ChunkedRun, payload: PurgeDeletedRows) -> Archive | None:
    if payload.archive is None or payload.dry_run:
        return None
    allowed = run.housekeeping.archive_folders
    return await Archive.of(run.claim, payload.archive, allowed, payload.archive_format)


async def _due(
    session: AsyncSession, models: Registry, cutoffs: Mapping[str, str]
) -> list[DueRows]:
    found = []
    for name, cutoff in cutoffs.items():
        try:
            facts = await read_facts(session, models.get(name).table)
        except UnknownModel as error:
            raise Rejected(str(error)) from None
        found.append(await soft_deleted(session, facts, cutoff))
    return found


async def _try(
    session: AsyncSession,
    models: Registry,
    retention: Mapping[str, int],
    payload: PurgeDeletedRows,
) -> Trial:
    await take_snapshot(session)
    cutoffs = await read_cutoffs(session, retention)
    due = await _due(session, models, cutoffs)
    return await count_removable(session, in_groups(due), payload.max_rows)


def _foreseen(trial: Trial) -> dict[str, Any]:
    purged = sum(one.purged for one in trial.tables.values())
    kept = sum(one.kept or 0 for one in trial.tables.values())
    return {
        "dry_run": True,
        "rows": purged + kept,
        "verdicts": {name: n for name, n in (("purged", purged), ("kept", kept)) if n},
        "tables": {
            name: {"purged": one.purged, "kept": one.kept} for name, one in trial.tables.items()
        },
        "capped": trial.capped,
    }


async def _close(run: ChunkedRun, archive: Archive) -> None:
    receipts = await run.read(lambda s: chunk.read_details(s, run.claim.job_id, "piece"))
    await archive.close([detail["piece"] for _, detail in receipts])


async def _done(run: ChunkedRun, archive: Archive | None, *, capped: bool) -> dict[str, Any]:
    tables: dict[str, dict[str, int]] = {}
    for counts, detail in await run.read(
        lambda s: chunk.read_details(s, run.claim.job_id, "table")
    ):
        table = tables.setdefault(detail["table"], {"purged": 0, "kept": 0, "pieces": 0})
        for verdict in ("purged", "kept"):
            table[verdict] += counts.get(verdict, 0)
        table["pieces"] += "piece" in detail
    done = await run.read(lambda session: chunk.tally(session, run.claim.job_id))
    where = {} if archive is None else {"archive": below(archive.where, MANIFEST)}
    return {
        "rows": done.rows,
        "verdicts": dict(done.counts),
        "tables": tables,
        "capped": capped,
        **where,
    }
