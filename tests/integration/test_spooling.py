"""A file and the job that imports it are accepted together, byte for byte, or not at all."""

import asyncio
import hashlib
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.engine import PoolProfile, create_engine, make_sessions
from db.ledger.spool import spool
from jobs import IdempotencyConflict, InputError, Producer, discover_jobs
from jobs._spooling import PART_BYTES, enqueue_file
from tests.gzipped import gzipped
from tests.proxy import Cut, proxied
from tests.stage import waiting_for_a_lock
from tests.workers import ROOT, until

Sessions = async_sessionmaker[AsyncSession]
HEROES = b"name\nAnn\nBob\n"
REQUEST = {"table": "hero"}
MEASURE = """
import asyncio, resource, sys
from pathlib import Path
from db.engine import PoolProfile, create_engine, make_sessions
from jobs import Producer, discover_jobs
from jobs._spooling import enqueue_file

def peak_kib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

async def main(url, small, large):
    engine = create_engine(url, profile=PoolProfile.LIGHT, application_name="measure")
    producer = Producer(make_sessions(engine), discover_jobs())
    await enqueue_file(producer, Path(small), {"table": "hero"})
    before = peak_kib()
    await enqueue_file(producer, Path(large), {"table": "hero"})
    await engine.dispose()
    print(peak_kib() - before)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def producer(sessions: Sessions) -> Producer:
    return Producer(sessions, discover_jobs())


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_file(content: bytes, name: str = "heroes.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write_file


async def stored(sessions: Sessions, job_id: UUID) -> list[bytes]:
    """The spooled parts as they lie in the table, in order."""
    async with sessions() as session:
        query = sa.select(spool.c.data).where(spool.c.job_id == job_id).order_by(spool.c.part_no)
        return list(await session.scalars(query))


def raw(parts: list[bytes]) -> bytes:
    """The bytes of the file: a part is marked "z" when it was deflated, "=" when not."""
    return b"".join(zlib.decompress(part[1:]) if part[:1] == b"z" else part[1:] for part in parts)


async def counts(sessions: Sessions) -> tuple[int, int, int]:
    """How many jobs, parts and idempotency keys there are."""
    async with sessions() as session:
        jobs, parts, keys = [
            await session.scalar(sa.text(f"SELECT count(*) FROM bulwark.{table}")) or 0
            for table in ("job", "spool", "idempotency")
        ]
    return jobs, parts, keys


@pytest.mark.parametrize(
    "size_bytes", [1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES]
)
async def test_the_parts_hold_exactly_the_bytes_of_the_file(
    producer: Producer, sessions: Sessions, write: Any, size_bytes: int
) -> None:
    content = (b"name\n" + os.urandom(4099) * (3 * PART_BYTES // 4099 + 1))[:size_bytes]
    accepted = await enqueue_file(producer, write(content), REQUEST)
    parts = await stored(sessions, accepted.job_id)
    assert raw(parts) == content
    assert len(parts) == -(-size_bytes // PART_BYTES)
    assert {part[:1] for part in parts} == {b"z"}


async def test_the_job_says_what_was_spooled(
    producer: Producer, sessions: Sessions, write: Any
) -> None:
    await enqueue_file(
        producer, write(HEROES), {**REQUEST, "on_conflict": "skip"}, actor="ann", priority=2
    )
    async with sessions() as session:
        row = (await session.execute(sa.text("SELECT * FROM bulwark.job"))).one()
    assert (row.kind, row.actor, row.priority) == ("insert_rows", "ann", 2)
    expected = {
        "table": "hero",
        "on_conflict": "skip",
        "source": {
            "type": "spooled",
            "name": "heroes.csv",
            "sha256": hashlib.sha256(HEROES).hexdigest(),
            "raw_bytes": 13,
            "text_bytes": 13,
            "compression": "none",
            "part_bytes": PART_BYTES,
            "format": "csv",
            "encoding": "utf-8",
            "delimiter": ",",
            "columns": None,
        },
    }
    assert {name: row.payload[name] for name in expected} == expected


async def test_a_gzip_file_is_stored_as_it_is(
    producer: Producer, sessions: Sessions, write: Any
) -> None:
    packed = gzipped(HEROES)
    accepted = await enqueue_file(producer, write(packed), REQUEST)
    assert await stored(sessions, accepted.job_id) == [b"=" + packed]


async def test_job_and_parts_become_visible_in_one_moment(
    producer: Producer, sessions: Sessions, write: Any
) -> None:
    """While the last part waits for a lock nobody sees the job; both are there afterwards."""
    async with sessions() as holder:
        await holder.execute(sa.text("LOCK TABLE bulwark.spool IN SHARE MODE"))
        spooling = asyncio.create_task(enqueue_file(producer, write(HEROES), REQUEST))
        await until(lambda: waiting_for_a_lock(sessions), "the spooling waits")
        assert await counts(sessions) == (0, 0, 0)
    await spooling
    assert await counts(sessions) == (1, 1, 0)


async def test_a_file_that_changes_between_the_two_passes_is_refused_with_nothing_left(
    producer: Producer, sessions: Sessions, write: Any
) -> None:
    path = write(HEROES)
    async with sessions() as holder:
        await holder.execute(sa.text("LOCK TABLE bulwark.job IN SHARE MODE"))
        spooling = asyncio.create_task(
            enqueue_file(producer, path, REQUEST, idempotency_key="monday")
        )
        await until(lambda: waiting_for_a_lock(sessions), "the first pass is over")
        write(b"name\nAnn\nBeb\n")
    with pytest.raises(InputError, match=r"heroes\.csv changed while it was read; try again"):
        await spooling
    assert await counts(sessions) == (0, 0, 0)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (gzipped(HEROES)[:-9], "cut off"),
        (gzipped(HEROES) + b"tail", "other bytes behind"),
        (b"", "empty"),
    ],
)
async def test_an_unusable_file_is_refused_before_anything_is_written(
    sessions: Sessions, write: Any, content: bytes, complaint: str
) -> None:
    def refuse_to_open() -> AsyncSession:
        pytest.fail("a session was opened")

    never = Producer(refuse_to_open, discover_jobs())  # type: ignore[arg-type]  # it must not be called
    with pytest.raises(InputError, match=complaint):
        await enqueue_file(never, write(content), REQUEST)
    assert await counts(sessions) == (0, 0, 0)


async def test_a_missing_file_is_refused(producer: Producer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        await enqueue_file(producer, tmp_path / "none.csv", REQUEST)


async def test_an_option_that_does_not_exist_is_refused_with_nothing_written(
    producer: Producer, sessions: Sessions, write: Any
) -> None:
    with pytest.raises(ValidationError, match="on_conflikt"):
        await enqueue_file(producer, write(HEROES), {**REQUEST, "on_conflikt": "skip"})
    assert await counts(sessions) == (0, 0, 0)


async def test_the_same_file_with_the_same_key_is_spooled_once(
    producer: Producer, sessions: Sessions, write: Any
) -> None:
    first = await enqueue_file(producer, write(HEROES), REQUEST, idempotency_key="k")
    again = await enqueue_file(producer, write(HEROES), REQUEST, idempotency_key="k")
    assert (again.job_id, again.created) == (first.job_id, False)
    assert await counts(sessions) == (1, 1, 1)


async def test_another_file_with_the_same_key_is_refused_with_nothing_written(
    producer: Producer, sessions: Sessions, write: Any
) -> None:
    await enqueue_file(producer, write(HEROES), REQUEST, idempotency_key="k")
    with pytest.raises(IdempotencyConflict):
        await enqueue_file(producer, write(HEROES + b"Eve\n"), REQUEST, idempotency_key="k")
    assert await counts(sessions) == (1, 1, 1)


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize("cut", [Cut.ANSWER, Cut.QUESTION])
async def test_a_cut_around_the_commit_ends_in_one_job_with_its_parts_once(
    database_url: str, sessions: Sessions, write: Any, key: str | None, cut: Cut
) -> None:
    content = b"name\n" + os.urandom(PART_BYTES)
    async with proxied(database_url) as (proxy, through):
        engine = create_engine(through, profile=PoolProfile.LIGHT, application_name="producer")
        producer = Producer(make_sessions(engine), discover_jobs())
        proxy.arm(cut)
        accepted = await enqueue_file(producer, write(content), REQUEST, idempotency_key=key)
        await engine.dispose()
        assert proxy.cuts == [cut]
    assert accepted.created
    assert raw(await stored(sessions, accepted.job_id)) == content
    assert await counts(sessions) == (1, 2, 0 if key is None else 1)


async def test_a_part_that_postgresql_refuses_leaves_no_job(
    producer: Producer, sessions: Sessions, write: Any
) -> None:
    async with sessions.begin() as session:
        await session.execute(sa.text("ALTER TABLE bulwark.spool ADD CHECK (part_no < 1)"))
    with pytest.raises(asyncpg.CheckViolationError):
        await enqueue_file(producer, write(b"name\n" + os.urandom(PART_BYTES)), REQUEST)
    assert await counts(sessions) == (0, 0, 0)


async def test_a_file_of_fifty_megabytes_is_spooled_in_bounded_memory(
    database_url: str, sessions: Sessions, tmp_path: Path
) -> None:
    small, large = tmp_path / "small.csv", tmp_path / "large.csv"
    block = b"name\n" + os.urandom(PART_BYTES - 5)
    small.write_bytes(block * 4)
    with large.open("wb") as file:
        for n in range(50):
            file.write(n.to_bytes(1, "big") + block[1:])
    measured = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", MEASURE, database_url, str(small), str(large)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert measured.returncode == 0, measured.stderr
    assert int(measured.stdout) < 16 * 1024
    assert await counts(sessions) == (2, 54, 0)
