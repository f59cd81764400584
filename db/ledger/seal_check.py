"""Whether the audit is what was sealed; and if not, which rows, segments or seals are not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from enum import StrEnum
from typing import Final, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger.seal import HASHED_ROWS, MARK_BYTES, Block, Seal

MOST_TOLD: Final = 1_000
"""Of so many faults the place is told; the others are counted."""
_JOB_BYTES: Final = 16


class FaultKind(StrEnum):
    """What can be wrong."""

    CHANGED = "changed"
    REMOVED = "removed"
    INSERTED = "inserted"
    REMOVED_SEGMENT = "removed_segment"
    FORGED_SEAL = "forged_seal"
    FORGED_HEAD = "forged_head"
    UNSIGNED = "unsigned"
    FORGED_ROTATION = "forged_rotation"
    COUNTER_BEHIND = "counter_behind"


class Key(NamedTuple):
    """Where a row of the audit stands."""

    job_id: UUID
    chunk_no: int
    entry_no: int

    @classmethod
    def of(cls, key: bytes) -> "Key":
        numbers = key[_JOB_BYTES:]
        return cls(
            UUID(bytes=key[:_JOB_BYTES]),
            int.from_bytes(numbers[:4], signed=True),
            int.from_bytes(numbers[4:], signed=True),
        )

    def __str__(self) -> str:
        return f"job {self.job_id} chunk {self.chunk_no} entry {self.entry_no}"


@dataclass(frozen=True)
class Fault:
    """Something that is not as it was sealed: how many rows, where, and in one sentence what."""

    kind: FaultKind
    segment: int | None
    detail: str
    rows: int = 0
    key: Key | None = None


@dataclass
class Findings:
    """What is found; faults beyond MOST_TOLD are counted in `untold`."""

    rows: int = 0
    rotated: int = 0
    faults: list[Fault] = field(default_factory=list)
    untold: int = 0

    def add(self, fault: Fault) -> None:
        if len(self.faults) < MOST_TOLD:
            self.faults.append(fault)
        else:
            self.untold += 1


_PLACED = f"""
    SELECT hashed.month, key, hash, CAST(CASE WHEN starts IS NULL THEN 0
               ELSE greatest(1, width_bucket(key, starts)) END AS integer) AS place
      FROM ({HASHED_ROWS}) AS hashed
      LEFT JOIN (SELECT month, array_agg(first_key ORDER BY block_no) AS starts
                   FROM bulwark.seal_block WHERE segment = :segment GROUP BY month) AS sealed
        ON sealed.month = hashed.month
"""
_HASHES = sa.text(
    "SELECT month, place, count(*), sha256(:salt || string_agg(hash, '' ORDER BY key)) "
    f"FROM ({_PLACED}) AS placed GROUP BY month, place"
).bindparams(sa.bindparam("salt", type_=sa.LargeBinary))
_MARKS = sa.text(
    f"SELECT key, substr(hash, 1, {MARK_BYTES}) FROM ({_PLACED}) AS placed "
    "WHERE month = :month AND place = :place ORDER BY key"
)
_SEALED_MARKS = sa.text(
    "SELECT marks FROM bulwark.seal_block WHERE segment = :segment AND block_no = :block_no"
)
Place = tuple[date, int]


async def check_rows(
    session: AsyncSession, one: Seal, blocks: Sequence[Block], found: Findings
) -> None:
    """Compare the rows of a segment with its blocks."""
    span = {"segment": one.segment, "from_xid": one.from_xid, "below_xid": one.below_xid}
    sealed = _placed(blocks)
    salted = {**span, "salt": blocks[0].salt if blocks else b""}
    there: dict[Place, tuple[int, bytes]] = {
        (row[0], row[1]): (row[2], row[3]) for row in await session.execute(_HASHES, salted)
    }
    for place in sorted({*sealed, *there}):
        rows, found_hash = there.get(place, (0, b""))
        found.rows += rows
        block = sealed.get(place)
        if block is None or (block.rows, block.hash) != (rows, found_hash):
            await _locate(session, one, place, block, span, found)


def _placed(blocks: Sequence[Block]) -> dict[Place, Block]:
    """The blocks by month and number in it, from 1; rows of a month without any have 0."""
    placed: dict[Place, Block] = {}
    counts: dict[date, int] = {}
    for block in blocks:
        counts[block.month] = counts.get(block.month, 0) + 1
        placed[block.month, counts[block.month]] = block
    return placed


async def _locate(
    session: AsyncSession,
    one: Seal,
    place: Place,
    block: Block | None,
    span: Mapping[str, object],
    found: Findings,
) -> None:
    """Tell which rows of a block are not as they were sealed."""
    asked = {**span, "month": place[0], "place": place[1]}
    actual = [(bytes(key), bytes(mark)) for key, mark in await session.execute(_MARKS, asked)]
    marks = b""
    if block is not None:
        its = {"segment": one.segment, "block_no": block.block_no}
        marks = (await session.scalar(_SEALED_MARKS, its)) or b""
    expected = [marks[at : at + MARK_BYTES] for at in range(0, len(marks), MARK_BYTES)]
    gaps = list(_gaps(expected, actual, None if block is None else block.first_key))
    rotated = bool(gaps) and await _is_rotated(session, place[0], one.from_xid)
    for gap in gaps:
        missing = gap.missing
        changed = 0 if rotated else min(missing, len(gap.extra))
        for at, key in enumerate(gap.extra):
            found.add(_extra(one.segment, Key.of(key), changed=at < changed))
        missing -= changed
        if rotated:
            found.rotated += missing
        elif missing:
            found.add(_removed(one.segment, gap, missing))
    if not gaps:
        sentence = f"the hash of a block of {place[0]:%Y-%m} differs, and none of its rows does"
        found.add(Fault(FaultKind.FORGED_SEAL, one.segment, sentence))


class Gap(NamedTuple):
    """Between two rows that are as sealed: how many are missing, and which are there instead."""

    missing: int
    extra: list[bytes]
    before: bytes | None
    after: bytes | None
    first: bytes | None


def _gaps(
    expected: Sequence[bytes], actual: Sequence[tuple[bytes, bytes]], first_key: bytes | None
) -> list[Gap]:
    """The differences between two lists of marks in the order of their keys."""
    index = {mark: at for at, mark in enumerate(expected)}
    gaps: list[Gap] = []
    extra: list[bytes] = []
    before: bytes | None = None
    reached = 0

    def close(upto: int, after: bytes | None) -> None:
        if upto > reached or extra:
            first = first_key if reached == 0 and upto else None
            gaps.append(Gap(upto - reached, list(extra), before, after, first))
        extra.clear()

    for key, mark in actual:
        at = index.get(mark)
        if at is None or at < reached:
            extra.append(key)
            continue
        close(at, key)
        reached, before = at + 1, key
    close(len(expected), None)
    return gaps


def _extra(segment: int, key: Key, *, changed: bool) -> Fault:
    if changed:
        return Fault(FaultKind.CHANGED, segment, f"{key} is not as it was sealed", 1, key)
    sentence = f"{key} was inserted after its segment had been sealed"
    return Fault(FaultKind.INSERTED, segment, sentence, 1, key)


def _removed(segment: int, gap: Gap, missing: int) -> Fault:
    """The first of the removed rows is known where the numbers of its neighbours leave no other."""
    before = None if gap.before is None else Key.of(gap.before)
    after = None if gap.after is None else Key.of(gap.after)
    key = None if gap.first is None or gap.extra else Key.of(gap.first)
    if key is None and before is not None and after is not None:
        following = before._replace(entry_no=before.entry_no + 1)
        if after == following._replace(entry_no=following.entry_no + missing):
            key = following
    behind = "" if before is None else f" behind {before}"
    ahead = "" if after is None else f" before {after}"
    where = f", the first of them {key}" if key is not None and missing > 1 else ""
    what = f"{key} was removed" if key is not None and missing == 1 else f"{missing:,} removed"
    sentence = f"{what}{where}{behind}{ahead}"
    return Fault(FaultKind.REMOVED, segment, sentence, missing, key)


_IS_ROTATED = sa.text(
    "SELECT EXISTS (SELECT FROM bulwark.rotation WHERE month = :month "
    "AND xid >= CAST(:from_xid AS xid8))"
)


async def _is_rotated(session: AsyncSession, month: date, from_xid: int) -> bool:
    """Whether the month was dropped, by the function that may, after the segment had begun."""
    asked = {"month": month, "from_xid": from_xid}
    is_rotated: bool = (await session.execute(_IS_ROTATED, asked)).scalar_one()
    return is_rotated


_UNSEALED = sa.text(
    """
    SELECT count(*),
           count(*) FILTER (WHERE xid >= pg_snapshot_xmax(pg_current_snapshot())),
           pg_snapshot_xmax(pg_current_snapshot())
      FROM bulwark.audit WHERE xid >= CAST(:from_xid AS xid8)
    """
)


async def count_unsealed(session: AsyncSession, last: Seal | None, found: Findings) -> int:
    """The rows behind the last segment; those of transactions that never were are faults."""
    from_xid = 0 if last is None else last.below_xid
    asked = {"from_xid": from_xid}
    rows, impossible, counter = (await session.execute(_UNSEALED, asked)).one()
    if counter < from_xid:
        sentence = (
            "this server counts its transactions behind those that are sealed, as after a restore "
            "from a dump; what was written since cannot be told from what was inserted"
        )
        found.add(Fault(FaultKind.COUNTER_BEHIND, None, sentence))
    elif impossible:
        sentence = f"{impossible:,} rows name transactions that have not begun yet"
        found.add(Fault(FaultKind.INSERTED, None, sentence, impossible))
    return int(rows) - int(impossible)


_ROTATED = sa.text(
    "SELECT DISTINCT ON (month) month, at, role FROM bulwark.rotation ORDER BY month, id DESC"
)


async def rotated_months(session: AsyncSession) -> list[Mapping[str, object]]:
    """The months that were dropped, the last time each, and by which role."""
    return [dict(row) for row in (await session.execute(_ROTATED)).mappings()]


_SEGMENTS_OF = sa.text(
    """
    SELECT DISTINCT segment FROM bulwark.seal_block
     WHERE month = bulwark.month_of(:job_id) AND substr(first_key, 1, 16) <= uuid_send(:job_id)
       AND substr(last_key, 1, 16) >= uuid_send(:job_id)
    UNION
    SELECT s.segment
      FROM (SELECT DISTINCT xid FROM bulwark.audit WHERE job_id = :job_id) AS a
      JOIN bulwark.seal AS s ON a.xid >= s.from_xid AND a.xid < s.below_xid
    """
).bindparams(sa.bindparam("job_id", type_=sa.Uuid))


async def segments_of(session: AsyncSession, job_id: UUID) -> set[int]:
    """The segments that may have rows of the job, or had them when they were sealed."""
    return set((await session.execute(_SEGMENTS_OF, {"job_id": job_id})).scalars())
