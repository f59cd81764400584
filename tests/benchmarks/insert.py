"""Insert: rows of CSV into `hero` with all its indexes, every row validated."""

from functools import partial

from jobs._input import InPlace
from jobs.insert_rows import InsertRows
from tests.benchmarks.heroes import COLUMNS, make_teams, write_heroes
from tests.benchmarks.imports import Contest, compare
from tests.benchmarks.measure import Options, Report, Tell
from tests.benchmarks.site import Site

TARGET_RATIO = 0.9
PAIR_S_PER_ROW = 30e-6
ours = "insert_rows of a file in place, by a worker, every row validated"
reference = "psql \\copy of the file into the same table"


def expected_s(options: Options) -> float:
    return 10 + options.pairs * options.rows * PAIR_S_PER_ROW


async def run(site: Site, options: Options, tell: Tell) -> Report:
    contest = await make_contest(site, options.rows)
    return await compare(site, contest, options.pairs, TARGET_RATIO, tell)


async def make_contest(site: Site, rows: int) -> Contest:
    """Write the file; before each run the table is emptied."""
    file = site.folder / "insert.csv"
    write_heroes(file, range(rows), rows, await make_teams(site))
    return Contest(
        rows,
        rows,
        InsertRows(table="hero", source=InPlace(type="in_place", path=str(file))),
        [f"\\copy hero ({COLUMNS}) FROM '{file}' CSV HEADER"],
        partial(site.execute, "TRUNCATE hero RESTART IDENTITY CASCADE", "CHECKPOINT"),
    )
