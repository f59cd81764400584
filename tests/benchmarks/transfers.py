"""Transfers: jobs that wait are drained by one worker, beside stock arq without our guarantees."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, TypeVar

import asyncpg
from arq.connections import ArqRedis, create_pool

from jobs._producer import Producer
from jobs.transfer_heroes import TransferHeroes
from tests.benchmarks.cpu import process_cpu_s
from tests.benchmarks.heroes import TEAMS, make_teams
from tests.benchmarks.measure import BenchmarkFailed, Options, Report, Target, Tell
from tests.benchmarks.pairs import alternate, median_figure
from tests.benchmarks.site import Site
from tests.benchmarks.stock_arq import redis_settings
from tests.benchmarks.stock_transfers import FUNCTION, POLL_DELAY_S
from tests.workers import ROOT, until

TARGET = Target("ratio", "at least", 0.8)
STOCK_MAX_JOBS = (10, 50)
ENQUEUED_AT_ONCE = 500
ours = "jobs transfer_heroes that wait, drained by one worker, with receipt and audit"
reference = (
    f"stock arq with poll_delay {POLL_DELAY_S:g} running the same transfers in one function call "
    f"each, at {' or '.join(map(str, STOCK_MAX_JOBS))} at a time, whichever is faster"
)
Move = tuple[int, int, int]
T = TypeVar("T")


@dataclass(frozen=True)
class Timed:
    """One run, from when the worker may begin until all transfers are committed."""

    transfers: int
    wall_s: float
    worker_cpu_s: float
    backend_cpu_s: float
    max_jobs: int | None = None

    @property
    def per_s(self) -> float:
        return self.transfers / self.wall_s

    def __str__(self) -> str:
        at_a_time = f" at {self.max_jobs}" if self.max_jobs else ""
        return (
            f"{self.per_s:7,.0f} transfers/s{at_a_time}, worker CPU {self.worker_cpu_s:.2f} s, "
            f"backend CPU {self.backend_cpu_s:.2f} s, of {self.wall_s:.2f} s"
        )


def expected_s(options: Options) -> float:
    return 10 + options.pairs * options.transfers * (0.0006 * 2 + 0.0004 + 0.0015)


async def run(site: Site, options: Options, tell: Tell) -> Report:
    """Both drain the same transfers in turn, on tables made ready."""
    await site.execute(FUNCTION)
    async with AsyncExitStack() as stack:
        producer = await stack.enter_async_context(site.producer())
        worker = await stack.enter_async_context(site.worker())
        arq = await stack.enter_async_context(await create_pool(redis_settings(site.valkey.url)))
        contest = _Contest(site, options.transfers, tell)
        done = await alternate(
            options.pairs,
            lambda: contest.stock(arq),
            lambda: contest.bulwark(producer, worker),
        )
    speed = median_figure(
        done, lambda one: one.per_s, name="speed", unit="transfers/s", target=TARGET
    )
    facts = {
        "transfers": options.transfers,
        "worker_cpu_s": median(pair.ours.worker_cpu_s for pair in done),
        "backend_cpu_s": median(pair.ours.backend_cpu_s for pair in done),
    }
    runs = [{"ours": asdict(pair.ours), "reference": asdict(pair.reference)} for pair in done]
    return Report([speed], runs, facts)


@dataclass
class _Contest:
    site: Site
    transfers: int
    tell: Tell

    async def bulwark(self, producer: Producer, worker: int) -> Timed:
        """The worker is held while its jobs are enqueued, so that all wait when it begins."""
        moves = await self._prepare()
        payloads = [
            TransferHeroes(hero_ids=[hero], from_team_id=start, to_team_id=end)
            for hero, start, end in moves
        ]
        os.kill(worker, signal.SIGSTOP)
        for some in _in_lots(payloads):
            await producer.enqueue_many(some)
        return await self._drained("ours", worker, lambda: os.kill(worker, signal.SIGCONT))

    async def stock(self, arq: ArqRedis) -> Timed:
        """The better of its settings."""
        runs = [await self._stock(arq, max_jobs) for max_jobs in STOCK_MAX_JOBS]
        return min(runs, key=lambda one: one.wall_s)

    async def _stock(self, arq: ArqRedis, max_jobs: int) -> Timed:
        moves = await self._prepare()
        async with self._stock_worker(max_jobs) as worker:
            os.kill(worker, signal.SIGSTOP)
            for some in _in_lots(moves):
                await asyncio.gather(*(arq.enqueue_job("transfer_plainly", *one) for one in some))
            go = lambda: os.kill(worker, signal.SIGCONT)  # noqa: E731 - as the other one
            return await self._drained("arq", worker, go, max_jobs)

    @asynccontextmanager
    async def _stock_worker(self, max_jobs: int) -> AsyncIterator[int]:
        """The process id of a stock worker that has opened its connections."""
        words = ["-m", "tests.benchmarks.stock_transfers", self.site.valkey.url]
        url = self.site.postgres.url.replace("+asyncpg", "")
        before = await self._clients()
        process = await asyncio.create_subprocess_exec(
            sys.executable, *words, url, str(max_jobs), cwd=ROOT, stderr=subprocess.DEVNULL
        )

        async def is_open() -> bool:
            return await self._clients() >= before + max_jobs

        try:
            await until(is_open, "the stock worker has opened its connections")
            yield process.pid
        finally:
            process.kill()
            await process.wait()

    async def _clients(self) -> int:
        query = "SELECT count(*)::int FROM pg_stat_activity WHERE backend_type = 'client backend'"
        found: int = await self.site.connection.fetchval(query)
        return found

    async def _prepare(self) -> list[Move]:
        """The same heroes in the same teams, each with a role there, and where each is to go."""
        teams = await make_teams(self.site)
        heroes = await self.site.connection.fetch(
            "INSERT INTO hero (name, age, team_id) SELECT 'Hero ' || n, 20, $2 + n % $3"
            " FROM generate_series(1, $1) AS n RETURNING id, team_id",
            self.transfers,
            teams[0],
            TEAMS,
        )
        await self.site.execute(
            "INSERT INTO membership (hero_id, team_id, role) SELECT id, team_id, 'back' FROM hero",
            "VACUUM ANALYZE hero, team, membership, transfer, bulwark.job",
            "CHECKPOINT",
        )
        return [(row["id"], row["team_id"], _another(teams, row)) for row in heroes]

    async def _drained(
        self, who: str, worker: int, go: Callable[[], None], max_jobs: int | None = None
    ) -> Timed:
        backend_s, worker_s = await self.site.backend_cpu_s(), process_cpu_s(worker)
        start_s = time.monotonic()
        go()
        await until(self._all_moved, "all transfers are committed", 600)
        wall_s = time.monotonic() - start_s
        timed = Timed(
            self.transfers,
            wall_s,
            process_cpu_s(worker) - worker_s,
            await self.site.backend_cpu_s() - backend_s,
            max_jobs,
        )
        await self._check(who)
        self.tell(f"  {who:5}{timed}")
        return timed

    async def _all_moved(self) -> bool:
        done: int = await self.site.connection.fetchval("SELECT count(*) FROM transfer")
        return done >= self.transfers

    async def _check(self, who: str) -> None:
        """Each hero has moved once, to the team of his transfer, and has no role where he was."""
        wrong: Any = await self.site.connection.fetchval(
            """
            SELECT count(*) FROM hero
              LEFT JOIN transfer ON transfer.hero_id = hero.id
              LEFT JOIN membership ON membership.hero_id = hero.id
             WHERE hero.team_id IS DISTINCT FROM transfer.to_team_id
                OR membership.team_id IS DISTINCT FROM transfer.from_team_id
                OR membership.deleted_at IS NULL
            """
        )
        if wrong:
            raise BenchmarkFailed(f"{who} left {wrong} heroes that have not moved as they should")


def _another(teams: list[int], hero: asyncpg.Record) -> int:
    """Where the hero goes: to one of seven teams behind his own."""
    place: int = hero["team_id"] - teams[0] + 1 + hero["id"] % 7
    return teams[place % len(teams)]


def _in_lots(all_of_them: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(all_of_them), ENQUEUED_AT_ONCE):
        yield all_of_them[start : start + ENQUEUED_AT_ONCE]
