"""The real input, 138,420 transfer records as untidy as they came, and what is in it by hand."""

import csv
import gzip
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest

from tests.workers import ROOT, run_bulwark

DATA = ROOT.parent / "shared" / "data" / "football-transfers.csv.gz"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"the real input {DATA.name} is not here")
ARRIVALS_AS_HEROES = (
    *("--where", "movement=in", "--map", "club=team.name", "--ignore-unknown"),
    *("--map", "external_id={name}|{nationality}|{position}"),
)
Record = dict[str, str]


class Arrival(NamedTuple):
    """A player who came to a club."""

    name: str
    age: int | None
    key: str
    club: str


def read_records() -> list[Record]:
    """By the csv module alone."""
    with gzip.open(DATA, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def arrivals_in(records: Iterable[Record]) -> list[Arrival]:
    return [
        Arrival(
            record["name"],
            int(float(record["age"])) if record["age"] else None,
            f"{record['name']}|{record['nationality']}|{record['position']}",
            record["club"],
        )
        for record in records
        if record["movement"] == "in"
    ]


def first_of_each_player(arrivals: Iterable[Arrival]) -> list[Arrival]:
    players: dict[str, Arrival] = {}
    for arrival in arrivals:
        players.setdefault(arrival.key, arrival)
    return list(players.values())


def imported(env: dict[str, str], model: str, *options: str) -> dict[str, Any]:
    """Import the records to the end, as a person would, and read back what became of them."""
    words = ("import", model, str(DATA), *options, "--follow", "--json")
    done = run_bulwark(*words, env=env, timeout_s=200.0)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report
