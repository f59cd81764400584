"""Put back the rows of an archive that a purge has written, still deleted softly as they were."""

import asyncio
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncSession

from db.catalog import TableFacts, read_facts
from db.errors import UnknownModel
from db.ledger import chunk
from db.ledger.audit import Entry
from db.ledger.chunk import OPENING, Receipt, Span
from db.ledger.verdict import RowVerdict, Verdict
from db.outcome import Inserted
from db.put_back import put_back
from jobs._archive import MANIFEST, Manifest, Piece, read_manifest, read_piece
from jobs._archive_place import ArchivePlace, open_archive
from jobs._declaration import Outcome, Payload, chunked_job
from jobs._errors import InputError, Rejected
from jobs._run import ChunkedRun, ChunkEffect


class RestoreArchive(Payload):
    """Which archive, by the folder or URI that its manifest is in, and which tables of it.

    Rows whose key is there are skipped, so a repetition changes nothing. `dry_run` reads all of it,
    checks that it is as it was written, and changes nothing.
    """

    archive: str
    tables: list[str] | None = None
    dry_run: bool = False


@chunked_job(timeout_s=24 * 3600)
async def restore_archive(run: ChunkedRun, payload: RestoreArchive) -> Outcome:
    """Insert the rows in the opposite order of their removal: what is referred to comes first."""
    where = payload.archive.removesuffix(MANIFEST).rstrip("/")
    allowed = run.housekeeping.archive_folders
    place = await asyncio.to_thread(open_archive, where, allowed)
    manifest, fingerprint = await read_manifest(place)
    tables = await run.read(lambda session: _facts(session, run, manifest, payload))
    pieces = [piece for piece in reversed(manifest.pieces) if piece.table in tables]
    if payload.dry_run:
        for piece in pieces:
            await read_piece(place, piece, manifest.format)
        return {"dry_run": True, "pieces": len(pieces), "rows": sum(one.rows for one in pieces)}
    await _open(run, fingerprint)
    await _restore(_Restoring(run, place, manifest, tables), pieces)
    done = await run.read(lambda session: chunk.tally(session, run.claim.job_id))
    return {"pieces": len(pieces), "rows": done.rows, "verdicts": dict(done.counts)}


@dataclass(frozen=True)
class _Restoring:
    run: ChunkedRun
    place: ArchivePlace
    manifest: Manifest
    tables: dict[str, TableFacts]


async def _restore(restoring: _Restoring, pieces: list[Piece]) -> None:
    """Commit a chunk for each piece that has no receipt."""
    run, first_row = restoring.run, 1
    last = await run.read(lambda session: chunk.last_receipt(session, run.claim.job_id))
    done = OPENING if last is None else last.chunk_no
    for number, piece in enumerate(pieces, 1):
        span = Span(first_row, piece.rows, 0, 0, 1, 1)
        first_row += piece.rows
        if number > done:
            await _commit(restoring, number, span, piece)


async def _commit(restoring: _Restoring, number: int, span: Span, piece: Piece) -> None:
    facts = restoring.tables[piece.table]
    texts = await read_piece(restoring.place, piece, restoring.manifest.format)
    computed = {one.name for one in facts.generated}
    known = {one.name for one in facts.columns} | computed
    if strange := sorted(texts.keys() - known):
        raise InputError(
            f"The archive has the column {strange[0]!r} and the table {piece.table} no longer; "
            "bring it back first."
        )

    async def work(session: AsyncSession) -> ChunkEffect:
        return _effect(number, span, piece, await put_back(session, facts, texts))

    await restoring.run.commit_chunk(number, span, work)


def _effect(number: int, span: Span, piece: Piece, done: Inserted) -> ChunkEffect:
    counts = {
        Verdict.INSERTED: len(done.inserted),
        Verdict.SKIPPED: len(done.skipped),
        Verdict.REJECTED: len(done.refused),
    }
    return ChunkEffect(
        Receipt(
            number,
            span,
            counts={name.value: count for name, count in counts.items() if count},
            detail={"table": piece.table, "piece": piece.name},
        ),
        [
            RowVerdict(
                *(span.first_row + at, number, None, Verdict.REJECTED),
                *(why.code, why.column, f"{piece.table}: {why.message}", None),
            )
            for at, why in sorted(done.refused.items())
        ],
        [Entry("insert", piece.table, len(done.inserted), done.keys)] if done.inserted else (),
    )


async def _facts(
    session: AsyncSession, run: ChunkedRun, manifest: Manifest, payload: RestoreArchive
) -> dict[str, TableFacts]:
    """The tables to restore, by name. Raises Rejected for one that there is not."""
    there = dict.fromkeys(piece.table for piece in manifest.pieces)
    try:
        asked = [run.models.get(name).name for name in payload.tables or there]
        tables = {name: run.models.get(name).table for name in asked}
    except UnknownModel as error:
        raise Rejected(str(error)) from None
    if missing := [name for name in asked if name not in there]:
        raise Rejected(f"The archive has no rows of the table {missing[0]}.")
    return {name: await read_facts(session, table) for name, table in tables.items()}


async def _open(run: ChunkedRun, fingerprint: str) -> None:
    """Fix, at the first run, which archive it is; refuse another one at a later run."""
    span = Span(1, 0, 0, 0, 1, 1)

    async def work(_: AsyncSession) -> ChunkEffect:
        return ChunkEffect(Receipt(OPENING, span, detail={"fingerprint": fingerprint}))

    opening = await run.commit_chunk(OPENING, span, work)
    if (opening.detail or {}).get("fingerprint") != fingerprint:
        raise InputError("the archive is not the one that this job began with; restore it anew")
