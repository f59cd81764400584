"""Update: patches of two fifths of the heroes, by primary key, in no order."""

import random
from functools import partial
from pathlib import Path

from jobs._input import InPlace
from jobs.update_rows import UpdateRows
from tests.benchmarks.heroes import COLUMNS, RESTORE, make_teams, write_heroes
from tests.benchmarks.imports import Contest, compare
from tests.benchmarks.measure import Options, Report, Tell
from tests.benchmarks.site import Site

TARGET_RATIO = 0.8
PAIR_S_PER_ROW = 60e-6
PATCHED = 2 / 5
ours = "update_rows by primary key, every row validated, with before-images"
reference = "psql \\copy to a temporary table, UPDATE FROM"

_UPDATE = """
    UPDATE hero SET name = incoming.name, age = incoming.age,
        updated_at = now(), version = hero.version + 1
      FROM incoming WHERE hero.id = incoming.id AND hero.deleted_at IS NULL
"""


def expected_s(options: Options) -> float:
    return 15 + options.pairs * options.rows * PAIR_S_PER_ROW


async def run(site: Site, options: Options, tell: Tell) -> Report:
    contest = await make_contest(site, options.rows)
    return await compare(site, contest, options.pairs, TARGET_RATIO, tell)


async def make_contest(site: Site, rows: int) -> Contest:
    """Write the heroes and their patches; each run finds the table without the patches."""
    heroes, patches = site.folder / "all.csv", site.folder / "patches.csv"
    write_heroes(heroes, range(rows), rows, await make_teams(site))
    await site.psql(f"\\copy hero ({COLUMNS}) FROM '{heroes}' CSV HEADER")
    await site.execute(
        "DROP TABLE IF EXISTS hero_before", "CREATE TABLE hero_before AS SELECT * FROM hero"
    )
    ids = [row["id"] for row in await site.connection.fetch("SELECT id FROM hero ORDER BY id")]
    patched = random.Random(11).sample(ids, round(rows * PATCHED))
    write_patches(patches, patched)
    return Contest(
        len(patched),
        rows,
        UpdateRows(table="hero", source=InPlace(type="in_place", path=str(patches))),
        [
            "CREATE TEMPORARY TABLE incoming (id bigint, name text, age int) ON COMMIT DROP",
            f"\\copy incoming FROM '{patches}' CSV HEADER",
            _UPDATE,
        ],
        partial(site.execute, *RESTORE),
    )


def write_patches(path: Path, ids: list[int]) -> None:
    """Write a patch with another name and age for each of these heroes."""
    with path.open("w") as out:
        out.write("id,name,age\n")
        out.writelines(f"{one},Patched {one % 90_001},{70 + one % 20}\n" for one in ids)
