"""Transfers in opposite directions, beside other writers of the same rows, all at full speed."""

import asyncio
import json
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from itertools import count, pairwise
from typing import Any

import asyncpg
import pytest
from pydantic import JsonValue
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from structlog.testing import capture_logs

from db.engine import PoolProfile, create_engine, make_sessions
from db.orders import ANYWHERE, Move, Moved, Order
from db.transaction import transaction
from db.transfers import transfer
from jobs.insert_rows import InsertRows
from jobs.transfer_heroes import TransferHeroes
from tests.inprocess import Bench
from tests.league import origin
from tests.stage import connected

pytestmark = pytest.mark.once

CLIENTS = 16
TRANSFERS = 1_000
HEROES = 64
MOST_S = 120.0
HEROES_OF_A_CLIENT = HEROES // CLIENTS
RED, BLUE = 1, 2
LEAGUE = f"""
    INSERT INTO team (name) VALUES ('Red'), ('Blue'), ('Green');
    INSERT INTO hero (name, external_id, team_id)
        SELECT 'Hero ' || n, 'H' || n, 1 + n % 2 FROM generate_series(1, {HEROES}) AS n;
    INSERT INTO membership (hero_id, team_id, role) SELECT id, team_id, 'captain' FROM hero;
"""
MANY_HEROES = f"""
    INSERT INTO hero (name, team_id)
        SELECT 'Extra', 1 + n % 2 FROM generate_series(1, {TRANSFERS}) AS n;
"""
Sessions = async_sessionmaker[AsyncSession]


@pytest.fixture
async def sessions(database_url: str, connection: asyncpg.Connection) -> AsyncIterator[Sessions]:
    """Enough connections that no client waits for one, to a league with no transfers yet."""
    await connection.execute(LEAGUE)
    engine = create_engine(database_url, profile=PoolProfile.HEAVY, application_name="clients")
    yield make_sessions(engine)
    await engine.dispose()


async def check_records(connection: asyncpg.Connection, moved: int) -> None:
    """Each hero's transfers are one way to where he is, of as many steps as his version counts."""
    homes = await connection.fetch("SELECT id, team_id, version FROM hero")
    ways: dict[int, list[tuple[int | None, int | None]]] = defaultdict(list)
    for one in await connection.fetch("SELECT * FROM transfer ORDER BY id"):
        ways[one["hero_id"]].append((one["from_team_id"], one["to_team_id"]))
    assert sum(map(len, ways.values())) == moved
    for hero in homes:
        way = ways[hero["id"]]
        assert all(here[1] == there[0] for here, there in pairwise(way))
        assert way == [] or way[-1][1] == hero["team_id"]
    lines = await connection.fetch(
        "SELECT (keys -> 'keys' -> 0 ->> 0)::bigint AS hero_id, before -> 'team_id' AS old "
        "FROM bulwark.audit WHERE action = 'move' ORDER BY version"
    )
    images = defaultdict(list)
    for line in lines:
        images[line["hero_id"]].append(json.loads(line["old"]))
    assert images == {hero_id: [start for start, _ in way] for hero_id, way in ways.items() if way}


async def test_a_thousand_opposite_transfers_from_sixteen_clients_fail_and_lose_nothing(
    sessions: Sessions, database_url: str, connection: asyncpg.Connection
) -> None:
    """Each client is a worker that has its share of the jobs delivered, one after the other."""
    await connection.execute(MANY_HEROES)
    homes = await connection.fetch("SELECT id, team_id FROM hero ORDER BY id LIMIT $1", TRANSFERS)
    bench = Bench(sessions, database_url)
    accepted = await bench.producer.enqueue_many(
        [
            TransferHeroes(hero_ids=[hero_id], from_team_id=home, to_team_id=RED + BLUE - home)
            for hero_id, home in homes
        ]
    )
    job_ids = [one.job_id for one in accepted]

    async def client(number: int) -> None:
        executor = await Bench(sessions, database_url).register()
        for job_id in job_ids[number::CLIENTS]:
            await executor.deliver(job_id)

    with capture_logs() as logs:
        await asyncio.gather(*map(client, range(CLIENTS)))

    ends = await connection.fetch("SELECT DISTINCT state, error, attempt FROM bulwark.job")
    assert [tuple(end) for end in ends] == [("succeeded", None, 0)]
    assert [line for line in logs if line["event"].startswith("transaction.")] == []
    await check_records(connection, moved=TRANSFERS)
    now = dict(await connection.fetch("SELECT id, team_id FROM hero"))
    assert all(now[hero_id] == RED + BLUE - home for hero_id, home in homes)


async def test_heroes_who_move_to_and_fro_in_single_transactions_end_where_they_are_sent(
    sessions: Sessions, connection: asyncpg.Connection
) -> None:
    numbers = count(1)

    async def client(number: int) -> None:
        """To and fro with some heroes, by turns in one direction and in the other."""
        for turn in range(TRANSFERS // CLIENTS):
            hero_id = 1 + number + CLIENTS * (turn % HEROES_OF_A_CLIENT)
            home = 1 + (hero_id + turn // HEROES_OF_A_CLIENT) % 2
            order = Order(origin(next(numbers)), [Move(hero_id, RED + BLUE - home, home)])
            work = partial(transfer, orders=[order])
            (done,) = await transaction(sessions, work, name="test.transfer")
            assert isinstance(done, Moved)

    with capture_logs() as logs:
        await asyncio.gather(*map(client, range(CLIENTS)))

    assert logs == []
    await check_records(connection, moved=TRANSFERS // CLIENTS * CLIENTS)


class Crowd:
    """Clients that do as they like to the same rows until enough is done."""

    def __init__(self, sessions: Sessions, url: str, seed: int) -> None:
        self._sessions = sessions
        self._url = url
        self._random = random.Random(seed)
        self._numbers = count(1)
        self.moved = 0

    async def transfer(self) -> None:
        """Several orders at once, of heroes in any order; other teams' locks are left to others."""
        to_team_id = self._random.choice([None, 1, 2, 3])
        orders = [
            Order(
                origin(next(self._numbers)),
                [Move(hero_id, to_team_id, ANYWHERE) for hero_id in self._all()[:4]],
            )
            for _ in range(6)
        ]
        work = partial(transfer, orders=orders)
        results = await transaction(self._sessions, work, name="test.transfer")
        done = zip(orders, results, strict=True)
        self.moved += sum(len(order.moves) for order, one in done if isinstance(one, Moved))

    async def import_heroes(self) -> None:
        """All heroes, in any order, each with a new age."""
        rows: list[dict[str, JsonValue]] = [
            {"external_id": f"H{n}", "name": f"Hero {n}", "age": self._age()} for n in self._all()
        ]
        await Bench(self._sessions, self._url).run(
            InsertRows(table="hero", rows=rows, on_conflict="update", chunk_rows=25)
        )

    def _age(self) -> int:
        return self._random.randrange(100)

    def _all(self) -> list[int]:
        return self._random.sample(range(1, HEROES + 1), HEROES)

    async def close_and_open_a_team(self) -> None:
        """Delete a team softly along with its roles, in the one order of locks, and restore it."""
        async with connected(self._url) as connection:
            async with connection.transaction():
                await connection.execute("UPDATE team SET deleted_at = now() WHERE id = 2")
                await connection.execute(
                    "WITH role AS (SELECT id FROM membership WHERE team_id = 2 AND deleted_at IS "
                    "NULL ORDER BY id FOR NO KEY UPDATE) UPDATE membership SET deleted_at = now(), "
                    "version = version + 1 FROM role WHERE membership.id = role.id"
                )
            await connection.execute("UPDATE team SET deleted_at = NULL WHERE id = 2")

    async def give_roles(self) -> None:
        """New roles, for heroes wherever they are."""
        rows: list[dict[str, JsonValue]] = [
            {"hero_id": n, "team_id": 1 + n % 3, "role": "scout"} for n in self._all()
        ]
        await Bench(self._sessions, self._url).run(
            InsertRows(table="membership", rows=rows, on_conflict="skip", chunk_rows=25)
        )


async def all_at_once(deeds: Sequence[tuple[Callable[[], Awaitable[None]], int]]) -> list[Any]:
    """Do each as often as is said, one client for each; what the log says of transactions."""

    async def again_and_again(deed: Callable[[], Awaitable[None]], times: int) -> None:
        for _ in range(times):
            await deed()

    with capture_logs() as logs:
        async with asyncio.timeout(MOST_S), asyncio.TaskGroup() as group:
            for deed, times in deeds:
                group.create_task(again_and_again(deed, times))
    return [line for line in logs if line["event"].startswith("transaction.")]


async def test_transfers_beside_deletions_of_their_teams_and_new_roles_meet_in_no_deadlock(
    sessions: Sessions, database_url: str, connection: asyncpg.Connection
) -> None:
    crowd = Crowd(sessions, database_url, seed=11)
    replayed = await all_at_once(
        [
            *[(crowd.transfer, 40)] * 10,
            *[(crowd.close_and_open_a_team, 40)] * 2,
            *[(crowd.give_roles, 4)] * 2,
        ]
    )

    assert crowd.moved > 0
    assert replayed == []
    await check_records(connection, moved=crowd.moved)


async def test_transfers_beside_imports_of_the_same_heroes_all_succeed(
    sessions: Sessions, database_url: str, connection: asyncpg.Connection
) -> None:
    """What an import has looked up may change before its lock; it may be replayed for that."""
    crowd = Crowd(sessions, database_url, seed=12)
    replayed = await all_at_once([*[(crowd.transfer, 20)] * 4, *[(crowd.import_heroes, 4)] * 2])

    assert crowd.moved > 0
    assert {line["event"] for line in replayed} <= {"transaction.replayed"}
    ends = await connection.fetch("SELECT DISTINCT state, error, attempt FROM bulwark.job")
    assert [tuple(end) for end in ends] == [("succeeded", None, 0)]
    await check_records(connection, moved=crowd.moved)
