"""Idle: the share of a core that a worker process uses while there is nothing to do."""

import asyncio
import time

from tests.benchmarks.cpu import process_cpu_s
from tests.benchmarks.measure import Figure, Options, Report, Target, Tell
from tests.benchmarks.site import Site
from tests.benchmarks.stock_arq import POLL_DELAY_S, stock_worker

SETTLE_S = 5.0
"""After the start, whose work is not that of an idle worker."""
TARGET = Target("ours", "below", 0.5)
ours = "a worker with beat, relay and rescue"
reference = f"stock arq with poll_delay {POLL_DELAY_S:g}, at the same time"


def expected_s(options: Options) -> float:
    return 5 + SETTLE_S + options.idle_s


async def run(site: Site, options: Options, tell: Tell) -> Report:
    """Both over the same seconds; the clock ticks of CPU time are 10 ms, so short is coarse."""
    async with site.worker() as worker:
        with stock_worker(site.valkey.url) as arq_worker:
            await asyncio.sleep(SETTLE_S)  # until the work of the start is over
            before = process_cpu_s(worker), process_cpu_s(arq_worker)
            backends_s, start_s = await site.backend_cpu_s(), time.monotonic()
            await asyncio.sleep(options.idle_s)  # what is measured is doing nothing for so long
            wall_s = time.monotonic() - start_s
            after = process_cpu_s(worker), process_cpu_s(arq_worker)
            backends_s = await site.backend_cpu_s() - backends_s
    mine, theirs = (100 * (a - b) / wall_s for a, b in zip(after, before, strict=True))
    backends = 100 * backends_s / wall_s
    tell(f"  {mine:.2f} % of a core over {wall_s:.0f} s, its backends {backends:.2f} %")
    ratio = mine / theirs if theirs else 0.0
    facts = {"wall_s": wall_s, "backends_percent": backends}
    return Report([Figure("CPU", "% of a core", mine, theirs, ratio, TARGET)], facts=facts)
