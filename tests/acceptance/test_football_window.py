"""Real input, replayed in file order: each player ends where the csv module alone puts him."""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from tests.football import Record, needs_data, read_records
from tests.workers import run_bulwark

pytestmark = [needs_data, pytest.mark.once]

NO_CLUB = ("", "Without Club", "Retired", "Career break", "Unknown", "Karriereende")
Env = dict[str, str]


class Order(NamedTuple):
    """A player, the club that he leaves, and the one that he joins; none is empty."""

    player: str
    start: str
    to: str


def orders_in(records: Iterable[Record]) -> list[Order]:
    """What each record says of a player, whichever of the two clubs reported it."""
    orders = []
    for record in records:
        club, other = record["club"], record["dealing_club"]
        other = "" if other in NO_CLUB else other
        start, to = (other, club) if record["movement"] == "in" else (club, other)
        player = f"{record['name']}|{record['nationality']}|{record['position']}"
        orders.append(Order(player, start, to))
    return orders


def replayed(
    orders: Sequence[Order], first: dict[str, str], *, from_anywhere: bool
) -> tuple[dict[str, str], Counter[str]]:
    """Where everybody ends, and how many transfers took effect, by nothing but a dictionary."""
    clubs, counts = dict(first), Counter[str]()
    for order in orders:
        start = clubs[order.player] if from_anywhere else order.start
        may_go = start != order.to and clubs[order.player] == start
        counts["moved" if may_go else "rejected"] += 1
        if may_go:
            clubs[order.player] = order.to
    return clubs, counts


def write(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(header)
        out.writerows(rows)
    return str(path)


def verdicts_of(env: Env, *words: str) -> dict[str, int]:
    done = run_bulwark(*words, "--follow", "--json", env=env, timeout_s=300.0)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["adds_up"]
    verdicts: dict[str, int] = report["verdicts"]
    return verdicts


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("from_anywhere", [False, True])
async def test_each_player_ends_where_his_transfers_lead(
    env: Env,
    sessions: async_sessionmaker[AsyncSession],
    tmp_path: Path,
    from_anywhere: bool,
) -> None:
    orders = orders_in(read_records())
    first: dict[str, str] = {}
    for order in orders:
        first.setdefault(order.player, "" if from_anywhere else order.start)
    clubs, counts = replayed(orders, first, from_anywhere=from_anywhere)

    names = sorted({club for order in orders for club in (order.start, order.to)} - {""})
    verdicts_of(env, "import", "team", write(tmp_path / "t.csv", ["name"], ([n] for n in names)))
    players = write(
        tmp_path / "p.csv",
        ["external_id", "name", "club"],
        ((player, player.partition("|")[0], club) for player, club in first.items()),
    )
    verdicts_of(env, "import", "hero", players, "--map", "club=team.name")
    window = write(tmp_path / "w.csv", ["player", "start", "to"], orders)
    ways = ["--map", "player=hero_id.external_id", "--map", "to=to_team_id.name"]
    ways += (
        ["--from-anywhere", "--ignore", "start"]
        if from_anywhere
        else ["--map", "start=from_team_id.name"]
    )
    assert verdicts_of(env, "transfer-window", window, *ways) == counts
    assert counts.total() == len(orders)

    async with sessions() as session:
        found = await session.execute(
            sa.text(
                "SELECT h.external_id, coalesce(t.name, '') FROM hero AS h "
                "LEFT JOIN team AS t ON t.id = h.team_id"
            )
        )
        assert {one[0]: one[1] for one in found} == clubs
        recorded = await session.scalar(sa.text("SELECT count(*) FROM transfer"))
    assert recorded == counts["moved"]
