"""Seals: hashes over the audit, chained segment by segment, so that no change of it stays hidden.

A segment is a range of transactions that have all ended, so that nothing can come into it later.
Its rows are in blocks, by the month of their job, which is dropped as a whole when its time comes.
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

from db.errors import SealsBroken
from db.ledger.audit import Xid8
from db.ledger.job import SCHEMA, Claim, State, job

FORM: Final = 1
"""Which columns of a row are hashed, and how; a later form leaves earlier seals as they are."""
BLOCK_ROWS: Final = 10_000
MARK_BYTES: Final = 8
"""So much of each row's hash is kept, to tell which one was changed."""
SALT_BYTES: Final = 16
NOTHING: Final = bytes(32)
"""What stands for the hash before the first segment."""

_instant = TIMESTAMP(timezone=True)

seal = sa.Table(
    "seal",
    SQLModel.metadata,
    sa.Column("segment", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("form", sa.SmallInteger, nullable=False),
    sa.Column("from_xid", Xid8, nullable=False),
    sa.Column("below_xid", Xid8, nullable=False),
    sa.Column("rows", sa.BigInteger, nullable=False),
    sa.Column("rotations", sa.LargeBinary, nullable=False),
    sa.Column("previous", sa.LargeBinary, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
    sa.Column("mac", sa.LargeBinary),
    sa.Column("sealed_at", _instant, nullable=False, server_default=sa.func.now()),
    schema=SCHEMA,
)

seal_block = sa.Table(
    "seal_block",
    SQLModel.metadata,
    sa.Column("segment", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("block_no", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("month", sa.Date, nullable=False),
    sa.Column("rows", sa.Integer, nullable=False),
    sa.Column("first_key", sa.LargeBinary, nullable=False),
    sa.Column("last_key", sa.LargeBinary, nullable=False),
    sa.Column("salt", sa.LargeBinary, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
    sa.Column("marks", sa.LargeBinary, nullable=False),
    schema=SCHEMA,
)


@dataclass(frozen=True)
class Block:
    """Rows of one segment and one month, by the order of their keys.

    The salt keeps the hash of a few rows, which leaves with the head, from being guessed at.
    """

    block_no: int
    month: date
    rows: int
    first_key: bytes
    last_key: bytes
    salt: bytes
    hash: bytes
    marks_hash: bytes

    @property
    def hashed(self) -> tuple[bytes, ...]:
        return self.first_key, self.last_key, self.salt, self.hash, self.marks_hash


@dataclass(frozen=True)
class Seal:
    """One segment: the transactions from one up to, but not including, another."""

    segment: int
    form: int
    from_xid: int
    below_xid: int
    rows: int
    rotations: bytes
    previous: bytes
    sealed_at: datetime
    hash: bytes = b""
    mac: bytes | None = None

    def digest(self, blocks: Sequence[Block]) -> bytes:
        """What its hash has to be."""
        facts = [
            *("bulwark.seal", self.form, self.segment, self.from_xid, self.below_xid, self.rows),
            *(self.rotations.hex(), self.sealed_at.astimezone(UTC).isoformat("T", "microseconds")),
            self.previous.hex(),
            [
                [one.block_no, one.month.isoformat(), one.rows]
                + [text.hex() for text in one.hashed]
                for one in blocks
            ],
        ]
        return hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).digest()

    def is_signed_with(self, keys: Sequence[str]) -> bool:
        return self.mac is not None and any(
            hmac.compare_digest(self.mac, signature(key, self.hash)) for key in keys
        )


def signature(key: str, seal_hash: bytes) -> bytes:
    """The hash signed with a key that PostgreSQL never sees."""
    return hmac.digest(key.encode(), b"bulwark.seal" + seal_hash, "sha256")


# What ROW(...)::text writes is unambiguous: it tells NULL from the empty text and quotes the rest.
# No value in it depends on the settings of the session.
HASHED_ROWS: Final = """
    SELECT bulwark.month_of(a.job_id) AS month,
           uuid_send(a.job_id) || int4send(a.chunk_no) || int4send(a.entry_no) AS key,
           sha256(convert_to(ROW(
               a.job_id, a.chunk_no, a.entry_no, extract(epoch FROM a.at)::text, a.xid, a.claim_id,
               a.kind, a.actor, a.correlation_id, a.action, a.table_name, a.rows, a.keys, a.before,
               a.before_sensitive, a.version)::text, 'UTF8')) AS hash
      FROM bulwark.audit AS a
     WHERE a.xid >= CAST(:from_xid AS xid8)
       AND a.xid < CAST(:below_xid AS xid8)
"""

_TURN = sa.text("SELECT pg_advisory_xact_lock(hashtextextended('bulwark.seal', 0))")
_HORIZON = sa.text("SELECT pg_snapshot_xmin(pg_current_snapshot())")
_LAST_OF = sa.text(
    "SELECT xid FROM bulwark.audit "
    "WHERE xid >= CAST(:from_xid AS xid8) "
    "AND xid < CAST(:below_xid AS xid8) ORDER BY xid OFFSET :behind LIMIT 1"
)
_ROTATIONS = sa.text(
    """
    SELECT sha256(convert_to(coalesce(string_agg(ROW(
               id, month - date '2000-01-01', extract(epoch FROM at)::text, role, xid)::text,
               ',' ORDER BY id), ''), 'UTF8')) AS hash,
           count(*) AS number
      FROM bulwark.rotation
     WHERE xid >= CAST(:from_xid AS xid8)
       AND xid < CAST(:below_xid AS xid8)
    """
)
_WRITE_BLOCKS = sa.text(
    f"""
    INSERT INTO bulwark.seal_block
           (segment, block_no, month, rows, first_key, last_key, salt, hash, marks)
    SELECT :segment, row_number() OVER (ORDER BY month, piece), month, count(*),
           (array_agg(key ORDER BY n))[1], (array_agg(key ORDER BY n))[count(*)],
           :salt, sha256(:salt || string_agg(hash, '' ORDER BY n)),
           string_agg(substr(hash, 1, {MARK_BYTES}), '' ORDER BY n)
      FROM (SELECT month, key, hash, n, (n - 1) / {BLOCK_ROWS} AS piece
              FROM (SELECT month, key, hash,
                           row_number() OVER (PARTITION BY month ORDER BY key) AS n
                      FROM ({HASHED_ROWS}) AS hashed) AS numbered) AS cut
     GROUP BY month, piece
    RETURNING block_no, month, rows, first_key, last_key, salt, hash, sha256(marks)
    """
).bindparams(sa.bindparam("salt", type_=sa.LargeBinary))


async def seal_next(session: AsyncSession, most: int, keys: Sequence[str]) -> Seal | None:
    """Seal the next segment, of about so many rows; None where nothing is left to seal.

    Waits for whoever else is sealing, so that each row is sealed once. The first of the keys signs
    it; a last segment that is not signed yet is followed by one that is, if need be without rows.
    Raises SealsBroken where the chain cannot be continued.
    """
    await session.execute(_TURN)
    last = await last_seal(session)
    horizon: int = (await session.execute(_HORIZON)).scalar_one()
    _require_continuable(last, horizon, keys)
    from_xid = 0 if last is None else last.below_xid
    span = {"from_xid": from_xid, "below_xid": horizon}
    end = await session.scalar(_LAST_OF, {**span, "behind": most - 1})
    span["below_xid"] = below_xid = horizon if end is None else end + 1
    segment = 1 if last is None else last.segment + 1
    facts = {"segment": segment, "salt": secrets.token_bytes(SALT_BYTES)}
    found = await session.execute(_WRITE_BLOCKS, {**span, **facts})
    blocks = sorted((Block(*row) for row in found), key=lambda one: one.block_no)
    rotations = (await session.execute(_ROTATIONS, span)).one()
    unsigned = bool(keys) and (last is None or last.mac is None)
    if not (blocks or rotations.number or unsigned):
        return None
    now: datetime = (await session.execute(sa.select(sa.func.now()))).scalar_one()
    made = Seal(
        *(segment, FORM, from_xid, below_xid, sum(one.rows for one in blocks), rotations.hash),
        *(NOTHING if last is None else last.hash, now),
    )
    return await _write(session, made, made.digest(blocks), keys)


async def _write(session: AsyncSession, made: Seal, made_hash: bytes, keys: Sequence[str]) -> Seal:
    mac = signature(keys[0], made_hash) if keys else None
    done = replace(made, hash=made_hash, mac=mac)
    await session.execute(sa.insert(seal).values(**vars(done)))
    return done


def _require_continuable(last: Seal | None, horizon: int, keys: Sequence[str]) -> None:
    """Raise SealsBroken where a further segment would make a broken chain look whole."""
    if last is None:
        return
    if horizon < last.below_xid:
        raise SealsBroken(
            "this server counts its transactions behind those that are sealed, as after a restore "
            "from a dump into another cluster; docs/audit.md says how to go on"
        )
    if keys and last.mac is not None and not last.is_signed_with(keys):
        raise SealsBroken(
            f"segment {last.segment} is signed with none of the keys in BULWARK_SEAL_KEY: it was "
            "forged, or the key it was signed with is missing; run `bulwark audit verify`"
        )


_SEAL_COLUMNS = tuple(seal.c[name] for name in Seal.__dataclass_fields__)
_BLOCK_COLUMNS = (
    *(seal_block.c.block_no, seal_block.c.month, seal_block.c.rows, seal_block.c.first_key),
    *(seal_block.c.last_key, seal_block.c.salt, seal_block.c.hash),
    sa.func.sha256(seal_block.c.marks),
)


async def last_seal(session: AsyncSession) -> Seal | None:
    """The head of the chain."""
    query = sa.select(*_SEAL_COLUMNS).order_by(seal.c.segment.desc()).limit(1)
    row = (await session.execute(query)).one_or_none()
    return None if row is None else Seal(*row)


async def was_sealed_before(session: AsyncSession, claim: Claim) -> bool:
    """Whether another job of this kind is known that has sealed something."""
    query = sa.select(
        sa.exists().where(
            job.c.state == State.SUCCEEDED,
            job.c.kind == claim.kind,
            job.c.id != claim.job_id,
            job.c.outcome["segments"].astext != "0",
        )
    )
    return bool(await session.scalar(query))


async def read_seals(session: AsyncSession, behind: int, most: int) -> list[Seal]:
    """The seals behind a segment, in order."""
    query = sa.select(*_SEAL_COLUMNS).where(seal.c.segment > behind).order_by(seal.c.segment)
    return [Seal(*row) for row in await session.execute(query.limit(most))]


async def read_blocks(session: AsyncSession, segment: int) -> list[Block]:
    """The blocks of a segment, without the marks of their rows."""
    query = sa.select(*_BLOCK_COLUMNS).where(seal_block.c.segment == segment)
    return [Block(*row) for row in await session.execute(query.order_by(seal_block.c.block_no))]


async def hash_rotations(session: AsyncSession, one: Seal) -> bytes:
    """The hash of the rotations that the segment's transactions have recorded."""
    span = {"from_xid": one.from_xid, "below_xid": one.below_xid}
    found: bytes = (await session.execute(_ROTATIONS, span)).one().hash
    return found
