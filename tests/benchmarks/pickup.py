"""Pick-up: from the enqueue's return to the first line of the job, with a worker that is idle."""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import TypeVar

from arq.connections import ArqRedis, create_pool

from jobs._producer import Producer
from tests.benchmarks.mark_start import MarkStart
from tests.benchmarks.measure import Figure, Options, Report, Target, Tell
from tests.benchmarks.pairs import alternate
from tests.benchmarks.site import Site
from tests.benchmarks.stock_arq import POLL_DELAY_S, redis_settings, stock_worker

MOST_PAUSE_S = 0.04
REFERENCE_SHARE = 5
"""One sample of the reference for so many of ours: it takes longer and matters less."""
TARGETS = {50: Target("ours", "below", 3.0), 99: Target("ours", "below", 10.0)}
ours = "a job in PostgreSQL, rung, claimed, inside its transaction"
reference = f"stock arq with poll_delay {POLL_DELAY_S:g}, a job in Redis"
JOB_MODULE = "tests.benchmarks.mark_start"

Batch = list[float]
T = TypeVar("T")


def expected_s(options: Options) -> float:
    return 10 + options.samples * 0.6 * MOST_PAUSE_S * (1 + 1 / REFERENCE_SHARE)


async def run(site: Site, options: Options, tell: Tell) -> Report:
    """Both in batches, in turn; the percentiles are of all samples."""
    rounds = min(options.pairs, options.samples)
    each = options.samples // rounds
    async with AsyncExitStack() as stack:
        producer = await stack.enter_async_context(site.producer(job_modules=(JOB_MODULE,)))
        await stack.enter_async_context(site.worker(job_modules=JOB_MODULE))
        stack.enter_context(stock_worker(site.valkey.url))
        arq = await stack.enter_async_context(await create_pool(redis_settings(site.valkey.url)))
        await _from_arq(arq, 1)  # waits until the stock worker has started
        done = await alternate(
            rounds,
            lambda: _from_arq(arq, max(1, each // REFERENCE_SHARE)),
            lambda: _from_bulwark(site, producer, each),
        )
    mine = [ms for pair in done for ms in pair.ours]
    theirs = [ms for pair in done for ms in pair.reference]
    tell(f"  ours {spread(mine)}")
    tell(f"  arq  {spread(theirs)}")
    runs = [{"ours": pair.ours, "reference": pair.reference} for pair in done]
    facts = {"samples": len(mine), "reference_samples": len(theirs)}
    return Report([_figure(p, mine, theirs) for p in TARGETS], runs, facts)


async def _from_bulwark(site: Site, producer: Producer, samples: int) -> Batch:
    returned = await _enqueue(lambda: producer.enqueue(MarkStart()), samples)
    delays = []
    for accepted, returned_ns in returned:
        row = await site.ended(accepted.job_id)
        started_ns = json.loads(row["outcome"])["started_ns"]
        delays.append((started_ns - returned_ns) / 1e6)
    return delays


async def _from_arq(arq: ArqRedis, samples: int) -> Batch:
    returned = await _enqueue(lambda: arq.enqueue_job("mark_start"), samples)
    delays = []
    for job, returned_ns in returned:
        assert job is not None
        started_ns = await job.result(timeout=60, poll_delay=0.01)
        delays.append((started_ns - returned_ns) / 1e6)
    return delays


async def _enqueue(enqueue: Callable[[], Awaitable[T]], samples: int) -> list[tuple[T, int]]:
    """Enqueue one by one with random pauses, and note when each call had returned."""
    returned = []
    for _ in range(samples):
        await asyncio.sleep(random.uniform(0.1, 1.0) * MOST_PAUSE_S)  # spread, as users' calls are
        accepted = await enqueue()
        returned.append((accepted, time.monotonic_ns()))
    return returned


def percentile(values: Sequence[float], p: int) -> float:
    """The p-th percentile; below a hundred samples the 99th is the largest."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[p - 1]


def spread(values: Sequence[float]) -> str:
    """The samples in a few words."""
    parts = [f"p{p} {percentile(values, p):.1f}" for p in (1, 50, 90, 99)]
    return f"{', '.join(parts)}, max {max(values):.1f} ms of {len(values)} samples"


def _figure(p: int, mine: Batch, theirs: Batch) -> Figure:
    own, other = percentile(mine, p), percentile(theirs, p)
    return Figure(f"p{p}", "ms", own, other, own / other, TARGETS[p])
