"""`make bench`: measure Bulwark side by side with what others do, in one run."""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import cast

from pydantic import ValidationError
from rich.text import Text

from tests.benchmarks import idle, insert, pickup, profile, purge, transfers, update, upsert
from tests.benchmarks.measure import BenchmarkFailed, Measure, Options
from tests.benchmarks.results import Outcome, circumstances, table, write_json
from tests.benchmarks.site import PsqlFailed, Site, open_site
from worker.child import stopping_like_ctrl_c
from worker.display import make_console, say

MEASURES = MappingProxyType(
    {
        "insert": cast(Measure, insert),
        "upsert": cast(Measure, upsert),
        "update": cast(Measure, update),
        "purge": cast(Measure, purge),
        "pickup": cast(Measure, pickup),
        "idle": cast(Measure, idle),
        "transfers": cast(Measure, transfers),
    }
)
LATEST = Path(".bench/latest.json")
PROFILED = {
    "insert": insert.make_contest,
    "upsert": upsert.make_contest,
    "update": update.make_contest,
}


def main() -> int:
    """Measure what was asked for. Returns 1 when a target was not met or a measure failed."""
    asked = _arguments()
    options = Options(asked.rows, asked.pairs, asked.samples, asked.idle_s, asked.transfers)
    with stopping_like_ctrl_c():
        if asked.profile:
            return asyncio.run(_profile(asked.measures or ["insert"], options))
        return asyncio.run(_measure(asked.measures or list(MEASURES), options, asked.out))


def _arguments() -> argparse.Namespace:
    default = Options()
    parser = argparse.ArgumentParser("make bench", description=__doc__)
    parser.add_argument("measures", nargs="*", choices=[[], *MEASURES], help="otherwise all")
    parser.add_argument("--rows", type=_positive, default=default.rows, help="of bulk writes")
    parser.add_argument("--pairs", type=_positive, default=default.pairs, help="runs of each side")
    parser.add_argument("--samples", type=_positive, default=default.samples, help="of pickup")
    parser.add_argument("--idle-s", type=float, default=default.idle_s, help="seconds of idle")
    parser.add_argument(
        "--transfers", type=_positive, default=default.transfers, help="jobs of transfers"
    )
    parser.add_argument("--out", type=Path, default=LATEST, help="where the JSON goes")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="tell where the time of one bulk write goes",
    )
    asked = parser.parse_args()
    if asked.profile and (wrong := set(asked.measures) - set(PROFILED)):
        parser.error(f"--profile is for {' and '.join(PROFILED)}, not {', '.join(sorted(wrong))}")
    return asked


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


async def _measure(names: Sequence[str], options: Options, out: Path) -> int:
    say(_announcement(names, options))
    async with open_site() as site:
        around = await circumstances(site, options)
        outcomes = [await _outcome(name, site, options) for name in names]
    write_json(out, around, outcomes)
    console = make_console()
    console.print()
    console.print(table(outcomes))
    say(f"All runs are in {out}.")
    return 0 if all(one.good for one in outcomes) else 1


def _announcement(names: Sequence[str], options: Options) -> str:
    seconds = 5 + sum(MEASURES[name].expected_s(options) for name in names)
    takes = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"
    return f"Measuring {', '.join(names)}: about {takes}; leave the machine alone meanwhile."


async def _outcome(name: str, site: Site, options: Options) -> Outcome:
    measure = MEASURES[name]
    say(f"{name}: {measure.ours}; against {measure.reference}")
    try:
        return Outcome(name, measure, await measure.run(site, options, say))
    except (BenchmarkFailed, PsqlFailed, ValidationError) as error:
        make_console().print(Text(f"  {name} failed: {error}", "bold red"))
        return Outcome(name, measure, error=str(error))


async def _profile(names: Sequence[str], options: Options) -> int:
    for name in names:
        say(f"Profiling one {name} of {options.rows:,} rows: about half a minute.")
        async with open_site() as site:
            contest = await PROFILED[name](site, options.rows)
            await profile.run(site, contest, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
