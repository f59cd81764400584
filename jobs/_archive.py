"""The archive of one purge: a piece for each batch, and a manifest of those that count."""

import asyncio
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Self
from uuid import UUID

from pydantic import BaseModel, ValidationError

from db.catalog import TableFacts
from db.ledger.job import Claim
from jobs._archive_format import SUFFIXES, ArchiveFormat, Texts, decode, encode
from jobs._archive_place import ArchivePlace, below, open_archive
from jobs._errors import InputError
from jobs._sources.place import ImportPlace

MANIFEST: Final = "manifest.json"
_STRANGE: Final = re.compile(r"[^A-Za-z0-9_]")


@dataclass(frozen=True)
class Piece:
    """One batch of a table as it is stored."""

    name: str
    table: str
    rows: int
    sha256: str


class Manifest(BaseModel):
    """All pieces of an archive that count, in the order in which their rows were removed."""

    job_id: UUID
    format: ArchiveFormat
    pieces: list[Piece]

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)


@dataclass(frozen=True)
class Archive:
    """The archive that a purge writes, in a folder of its own that is named after the job.

    Names of pieces have the claim in them: what a worker writes that has lost its job replaces
    nothing that the next one has committed, and is removed in the end.
    """

    claim: Claim
    place: ArchivePlace
    form: ArchiveFormat
    where: str

    @classmethod
    async def of(
        cls, claim: Claim, place: str, allowed: Sequence[ImportPlace], form: ArchiveFormat
    ) -> Self:
        """Raises InputError when the place is outside the allowed ones."""
        where = below(place, str(claim.job_id))
        return cls(claim, await asyncio.to_thread(open_archive, where, allowed), form, where)

    async def store(self, number: int, facts: TableFacts, texts: Texts, rows: int) -> Piece:
        """Write the rows of a batch, for good, before the batch is committed."""
        claimed = self.claim.claim_id.hex[:8]
        table = _STRANGE.sub("_", facts.table_name)
        name = f"{table}-{number:06}-{claimed}{SUFFIXES[self.form]}"

        def write() -> str:
            data = encode(texts, facts, self.form)
            self.place.write(name, data)
            return hashlib.sha256(data).hexdigest()

        return Piece(name, facts.table_name, rows, await asyncio.to_thread(write))

    async def close(self, pieces: Sequence[Mapping[str, Any]]) -> None:
        """Write the manifest of what was committed, and remove what was not."""
        kept = [Piece(**piece) for piece in pieces]
        manifest = Manifest(job_id=self.claim.job_id, format=self.form, pieces=kept)

        def write() -> None:
            self.place.write(MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
            known = {MANIFEST, *(piece.name for piece in kept)}
            for name in self.place.names():
                if name not in known:
                    self.place.remove(name)

        await asyncio.to_thread(write)


def as_detail(piece: Piece) -> dict[str, Any]:
    """What the receipt of a batch keeps."""
    return asdict(piece)


async def read_manifest(place: ArchivePlace) -> tuple[Manifest, str]:
    """The manifest and its fingerprint. Raises InputError."""
    data = await asyncio.to_thread(place.read, MANIFEST)
    try:
        return Manifest.model_validate(json.loads(data)), hashlib.sha256(data).hexdigest()
    except (ValueError, ValidationError):
        raise InputError(f"The file {MANIFEST} is not that of an archive of Bulwark.") from None


async def read_piece(
    place: ArchivePlace, piece: Piece, form: ArchiveFormat
) -> dict[str, list[str | None]]:
    """The rows of a piece. Raises InputError unless it is exactly as it was written."""

    def read() -> dict[str, list[str | None]]:
        data = place.read(piece.name)
        if hashlib.sha256(data).hexdigest() != piece.sha256:
            raise InputError(
                f"The piece {piece.name} of the archive is not what was written: its checksum is "
                "another; restore it from a copy."
            )
        return decode(data, form)

    columns = await asyncio.to_thread(read)
    if {len(values) for values in columns.values()} != {piece.rows}:
        raise InputError(f"The piece {piece.name} of the archive has not its {piece.rows} rows.")
    return columns
