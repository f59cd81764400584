"""Upsert: on_conflict update, with every other row of the file there before in another form."""

from functools import partial

from jobs._input import InPlace
from jobs.insert_rows import InsertRows
from tests.benchmarks.heroes import COLUMNS, RESTORE, make_teams, write_heroes
from tests.benchmarks.imports import Contest, compare
from tests.benchmarks.measure import Options, Report, Tell
from tests.benchmarks.site import Site

TARGET_RATIO = 0.75
PAIR_S_PER_ROW = 75e-6
ours = "insert_rows with on_conflict update, every row validated and audited"
reference = "psql \\copy to a temporary table, INSERT ... ON CONFLICT DO UPDATE"

_UPSERT = f"""
    INSERT INTO hero ({COLUMNS}) SELECT {COLUMNS} FROM incoming
    ON CONFLICT (external_id) WHERE deleted_at IS NULL
    DO UPDATE SET name = excluded.name, age = excluded.age, email = excluded.email,
        team_id = excluded.team_id, updated_at = now(), version = hero.version + 1
"""


def expected_s(options: Options) -> float:
    return 15 + options.pairs * options.rows * PAIR_S_PER_ROW


async def run(site: Site, options: Options, tell: Tell) -> Report:
    contest = await make_contest(site, options.rows)
    return await compare(site, contest, options.pairs, TARGET_RATIO, tell)


async def make_contest(site: Site, rows: int) -> Contest:
    """Write the file and keep what is there before; each run finds the table in that state."""
    file = site.folder / "upsert.csv"
    teams = await make_teams(site)
    write_heroes(file, range(rows), rows, teams)
    await _keep_every_other(site, rows, teams)
    return Contest(
        rows,
        rows,
        InsertRows(
            table="hero",
            source=InPlace(type="in_place", path=str(file)),
            on_conflict="update",
        ),
        [
            "CREATE TEMPORARY TABLE incoming (LIKE hero) ON COMMIT DROP",
            *(f"ALTER TABLE incoming ALTER {name} DROP NOT NULL" for name in _NOT_GIVEN),
            f"\\copy incoming ({COLUMNS}) FROM '{file}' CSV HEADER",
            _UPSERT,
        ],
        partial(site.execute, *RESTORE),
    )


_NOT_GIVEN = ("id", "created_at", "updated_at", "version")


async def _keep_every_other(site: Site, rows: int, teams: list[int]) -> None:
    """Let the rows of even numbers be there, with other names and ages."""
    before = site.folder / "before.csv"
    write_heroes(before, range(0, rows, 2), rows, teams)
    await site.psql(f"\\copy hero ({COLUMNS}) FROM '{before}' CSV HEADER")
    await site.execute(
        "UPDATE hero SET name = name || ' the Elder', age = age + 1",
        "DROP TABLE IF EXISTS hero_before",
        "CREATE TABLE hero_before AS SELECT * FROM hero",
    )
