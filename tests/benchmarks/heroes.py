"""The heroes of insert and upsert: valid rows only, the same ones every time."""

import random
from collections.abc import Iterable
from pathlib import Path

from tests.benchmarks.site import Site

COLUMNS = "name,age,email,external_id,team_id"
TEAMS = 500
RESTORE = (
    "TRUNCATE hero CASCADE",
    "INSERT INTO hero SELECT * FROM hero_before",
    "VACUUM (ANALYZE) hero",
    "CHECKPOINT",
)
"""Brings back the heroes that were kept in `hero_before`."""


async def make_teams(site: Site) -> list[int]:
    """Teams for the heroes to belong to, and no heroes. Returns the teams' ids."""
    await site.execute("TRUNCATE team, hero CASCADE")
    rows = await site.connection.fetch(
        "INSERT INTO team (name) SELECT 'Team ' || n FROM generate_series(1, $1) AS n RETURNING id",
        TEAMS,
    )
    return [row["id"] for row in rows]


def write_heroes(path: Path, numbers: Iterable[int], rows: int, teams: list[int]) -> None:
    """Write those of all `rows` heroes that have these numbers.

    External ids are in order as if numbered by another system; e-mail addresses are in none.
    """
    mailboxes = list(range(rows))
    random.Random(7).shuffle(mailboxes)
    with path.open("w") as out:
        out.write(COLUMNS + "\n")
        out.writelines(_line(number, mailboxes[number], teams) for number in numbers)


def _line(number: int, mailbox: int, teams: list[int]) -> str:
    age, team = 16 + number % 50, teams[number * 7 % len(teams)]
    return f"Hero {number * 31 % 90_001},{age},hero{mailbox}@example.org,H{number:07},{team}\n"
