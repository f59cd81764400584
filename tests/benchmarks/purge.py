"""Purge: two of five heroes, deleted softly long ago, go for good; beside it others update rows."""

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import asyncpg

from jobs._producer import Producer
from jobs.purge_deleted_rows import PurgeDeletedRows
from tests.benchmarks.cpu import process_cpu_s
from tests.benchmarks.heroes import COLUMNS, make_teams, write_heroes
from tests.benchmarks.imports import Timed
from tests.benchmarks.measure import BenchmarkFailed, Figure, Options, Report, Target, Tell
from tests.benchmarks.pairs import alternate, median_figure
from tests.benchmarks.site import Site

TARGET_RATIO = 0.66
PAIR_S_PER_ROW = 60e-6
RETENTION_DAYS = 30
ours = "purge_deleted_rows, batch by batch, each with its receipt and audit"
reference = "psql DELETE of the same rows in one statement"

_DELETE = "DELETE FROM hero WHERE deleted_at < now() - interval '30 days'"
_RESTORE = (
    "TRUNCATE hero CASCADE",
    "INSERT INTO hero SELECT * FROM hero_before ORDER BY id",
    "VACUUM (ANALYZE) hero",
    "CHECKPOINT",
)


def expected_s(options: Options) -> float:
    return 20 + (options.pairs + 1) * options.rows * PAIR_S_PER_ROW


async def run(site: Site, options: Options, tell: Tell) -> Report:
    gone = await make_heroes(site, options.rows)
    async with site.producer() as producer, site.worker() as worker:
        contest = Contest(site, producer, worker, gone, tell)
        done = await alternate(options.pairs, contest.psql, contest.job)
        figures = await contest.beside()
    speed = median_figure(
        done,
        lambda timed: timed.rows_per_s,
        name="speed",
        unit="rows/s",
        target=Target("ratio", "at least", TARGET_RATIO),
    )
    runs = [{"ours": asdict(pair.ours), "reference": asdict(pair.reference)} for pair in done]
    facts = {
        "rows": gone,
        "worker_cpu_s": statistics.median(pair.ours.worker_cpu_s for pair in done),
        "backend_cpu_s": statistics.median(pair.ours.backend_cpu_s for pair in done),
        "reference_backend_cpu_s": statistics.median(p.reference.backend_cpu_s for p in done),
    }
    return Report([speed, *figures], runs, facts)


async def make_heroes(site: Site, rows: int) -> int:
    """Heroes of whom two of five were deleted, 20,000 at a time. Returns how many that are."""
    file = site.folder / "purge.csv"
    write_heroes(file, range(rows), rows, await make_teams(site))
    await site.psql(f"\\copy hero ({COLUMNS}) FROM '{file}' CSV HEADER")
    await site.execute(
        "UPDATE hero SET deleted_at = now() - interval '40 days' + id / 50000 * interval '1 minute'"
        " WHERE id % 5 < 2",
        "DROP TABLE IF EXISTS hero_before",
        "CREATE TABLE hero_before AS SELECT * FROM hero",
    )
    gone: int = await site.connection.fetchval(
        "SELECT count(*) FROM hero WHERE deleted_at IS NOT NULL"
    )
    return gone


@dataclass
class Contest:
    """Removes the same rows in one way or the other, and looks at what is left."""

    site: Site
    producer: Producer
    worker_pid: int
    gone: int
    tell: Tell
    left: tuple[int, ...] | None = None

    async def psql(self) -> Timed:
        async def delete() -> None:
            await self.site.psql(_DELETE)

        return await self._timed("psql", delete)

    async def job(self) -> Timed:
        return await self._timed("ours", self._purge)

    async def beside(self) -> list[Figure]:
        """How long another client's updates of single rows take, alone and beside a purge."""
        await self.site.execute(*_RESTORE)
        async with updates(self.site) as alone:
            await asyncio.sleep(3)  # the time of the idle measure
        await self.site.execute(*_RESTORE)
        async with updates(self.site) as busy:
            await self._purge()
        self.tell(f"  {len(busy)} updates beside the purge, {len(alone)} alone")
        return [
            _figure("p50 of updates beside", busy, alone, 0.5),
            _figure("p99 of updates beside", busy, alone, 0.99),
        ]

    async def _purge(self) -> None:
        payload = PurgeDeletedRows(tables=["hero"], retention_days={"hero": RETENTION_DAYS})
        accepted = await self.producer.enqueue(payload)
        row = await self.site.ended(accepted.job_id)
        if row["state"] != "succeeded":
            raise BenchmarkFailed(f"the job is {row['state']} ({row['reason']}): {row['error']}")

    async def _timed(self, who: str, remove: Callable[[], Awaitable[None]]) -> Timed:
        await self.site.execute(*_RESTORE)
        cpu_s, worker_s = await self.site.backend_cpu_s(), process_cpu_s(self.worker_pid)
        start_s = time.monotonic()
        await remove()
        wall_s = time.monotonic() - start_s
        timed = Timed(
            self.gone,
            wall_s,
            await self.site.backend_cpu_s() - cpu_s,
            process_cpu_s(self.worker_pid) - worker_s,
        )
        found = await self.site.connection.fetchrow(
            "SELECT count(*), count(deleted_at), sum(age), sum(id) FROM hero"
        )
        left = tuple(found)
        if left[1] or left != (self.left or left):
            raise BenchmarkFailed(f"{who} left {left}, the run before {self.left}")
        self.left = left
        self.tell(f"  {who:5}{timed}")
        return timed


def _figure(name: str, busy: Sequence[float], alone: Sequence[float], share: float) -> Figure:
    with_purge, without = _quantile(busy, share), _quantile(alone, share)
    return Figure(name, "ms", with_purge, without, with_purge / without)


def _quantile(times_ms: Sequence[float], share: float) -> float:
    if not times_ms:
        raise BenchmarkFailed("no update was made beside")
    return sorted(times_ms)[min(int(len(times_ms) * share), len(times_ms) - 1)]


@asynccontextmanager
async def updates(site: Site) -> AsyncIterator[list[float]]:
    """Another client that updates live rows one by one; the milliseconds that each took."""
    client = Client(site)
    task = asyncio.create_task(client.update())
    try:
        await client.ready.wait()
        yield client.times_ms
    finally:
        client.stop = True
        await task


@dataclass
class Client:
    site: Site
    times_ms: list[float] = field(default_factory=list)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    stop: bool = False

    async def update(self) -> None:
        url = self.site.postgres.url.replace("+asyncpg", "")
        connection: Any = await asyncpg.connect(url)
        try:
            rows = await connection.fetch("SELECT id FROM hero WHERE deleted_at IS NULL")
            ids = random.Random(7).sample([row["id"] for row in rows], len(rows))
            self.ready.set()
            for one in ids:
                if self.stop:
                    return
                start_s = time.monotonic()
                await connection.execute("UPDATE hero SET age = age + 1 WHERE id = $1", one)
                self.times_ms.append((time.monotonic() - start_s) * 1000)
                await asyncio.sleep(0.002)  # a client with other things to do, too
        finally:
            await connection.close()
