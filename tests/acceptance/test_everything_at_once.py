"""Random imports, updates, transfers, deletes and restores from eight clients keep the books right.

A Hypothesis state machine hands operations to the clients, lets all of them go at once, and looks
at the books when they are at rest: nothing may depend on who came first.
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, ClassVar

import asyncpg
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from sqlalchemy.ext.asyncio import AsyncEngine

from db.engine import PoolProfile, create_engine, make_sessions
from jobs._declaration import Payload
from jobs.insert_rows import InsertRows
from jobs.restore_rows import RestoreRows
from jobs.soft_delete_rows import SoftDeleteRows
from jobs.swap_heroes import SwapHeroes
from jobs.transfer_heroes import TransferHeroes
from jobs.update_rows import UpdateRows
from tests.inprocess import Bench
from worker.testing.databases import Databases

Row = dict[str, Any]
Asked = Payload | Callable[[], Awaitable[Payload]]
CLIENTS = 8
HEROES = 10
TEAMS = 4
SETUP = f"""
    TRUNCATE team, hero, membership, transfer, bulwark.job, bulwark.chunk, bulwark.verdict,
             bulwark.audit RESTART IDENTITY CASCADE;
    INSERT INTO team (name, roster_limit)
    SELECT 'Team ' || n, CASE WHEN n = 1 THEN 3 END FROM generate_series(1, {TEAMS}) AS n;
    INSERT INTO hero (name, external_id, age, team_id)
    SELECT 'Hero ' || n, 'x' || n, 20, nullif(n % ({TEAMS} + 1), 0)
      FROM generate_series(1, {HEROES}) AS n;
    INSERT INTO membership (hero_id, team_id, role)
    SELECT 1 + n % {HEROES}, 1 + n % {TEAMS}, 'role ' || n / {HEROES}
      FROM generate_series(0, {2 * HEROES}) AS n;
"""
TABLES = ("team", "hero", "membership", "transfer")
TIMES = ("created_at", "updated_at", "version")

clients = st.integers(0, CLIENTS - 1)
heroes = st.lists(st.integers(1, HEROES + 2), min_size=1, max_size=6, unique=True)
pair = st.lists(st.integers(1, HEROES), min_size=1, max_size=2, unique=True)
hero = st.integers(1, HEROES)
team = st.integers(1, TEAMS)
ages = st.sampled_from([None, 20, 30, 40])


class Books(RuleBasedStateMachine):
    """Operations wait with their clients until all of them go at once."""

    url: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._waiting: dict[int, list[Asked]] = defaultdict(list)
        self._runner.run(self._open())

    async def _open(self) -> None:
        self._connection: asyncpg.Connection = await asyncpg.connect(
            self.url.replace("+asyncpg", "")
        )
        await self._connection.execute(SETUP)
        self._start = {table: await self._rows(table) for table in TABLES}
        self._engine: AsyncEngine = create_engine(
            self.url, profile=PoolProfile.HEAVY, application_name="clients"
        )
        self._sessions = make_sessions(self._engine)

    # What clients ask for

    @rule(client=clients, keys=heroes, age=ages, team=team)
    def import_heroes(self, client: int, keys: list[int], age: int | None, team: int) -> None:
        rows: list[Any] = [
            {"external_id": f"x{key}", "name": f"By {client}", "age": age, "team_id": team}
            for key in keys
        ]
        self._ask(
            client,
            InsertRows(table="hero", rows=rows, on_conflict="update", update=["name", "age"]),
        )

    @rule(client=clients, keys=heroes, age=ages)
    def update_heroes(self, client: int, keys: list[int], age: int | None) -> None:
        self._ask(client, UpdateRows(table="hero", keys=[*keys], values={"age": age}))

    @rule(client=clients, age=st.sampled_from([20, 30]), to=ages)
    def update_by_age(self, client: int, age: int, to: int | None) -> None:
        self._ask(client, UpdateRows(table="hero", filter={"age": age}, values={"age": to}))

    @rule(client=clients, keys=pair, to=team)
    def transfer(self, client: int, keys: list[int], to: int) -> None:
        self._ask(client, TransferHeroes(hero_ids=keys, to_team_id=to, from_anywhere=True))

    @rule(client=clients, one=hero, start=team, to=team)
    def transfer_from(self, client: int, one: int, start: int, to: int) -> None:
        self._ask(client, TransferHeroes(hero_ids=[one], from_team_id=start, to_team_id=to))

    @rule(client=clients, keys=pair)
    def release(self, client: int, keys: list[int]) -> None:
        self._ask(client, TransferHeroes(hero_ids=keys, to_team_id=None, from_anywhere=True))

    @rule(client=clients, a=hero, b=hero)
    def swap(self, client: int, a: int, b: int) -> None:
        """Two heroes, by the teams in which the client finds them when it is his turn."""

        async def find() -> Payload:
            teams = await self._teams_of(a, b)
            return SwapHeroes(
                team_a_id=teams[0], hero_ids_a=[a], team_b_id=teams[1], hero_ids_b=[b]
            )

        self._ask(client, find)

    async def _teams_of(self, *keys: int) -> list[int]:
        async with self._sessions() as session:
            query = sa.text("SELECT team_id FROM hero WHERE id = :id")
            return [await session.scalar(query, {"id": key}) or 1 for key in keys]

    @rule(client=clients, key=hero)
    def delete_a_hero(self, client: int, key: int) -> None:
        self._ask(client, SoftDeleteRows(table="hero", keys=[key]))

    @rule(client=clients, keys=heroes)
    def restore_heroes(self, client: int, keys: list[int]) -> None:
        self._ask(client, RestoreRows(table="hero", keys=[*keys]))

    @rule(client=clients, one=team, back=st.booleans())
    def delete_or_restore_a_team(self, client: int, one: int, back: bool) -> None:
        kind = RestoreRows if back else SoftDeleteRows
        self._ask(client, kind(table="team", keys=[one]))

    def _ask(self, client: int, asked: Asked) -> None:
        self._waiting[client].append(asked)

    @precondition(lambda self: sum(map(len, self._waiting.values())) >= 3 * CLIENTS)
    @rule()
    def go(self) -> None:
        self._runner.run(self._go())

    async def _go(self) -> None:
        waiting, self._waiting = self._waiting, defaultdict(list)
        await asyncio.gather(*map(self._client, waiting.values()))
        await self._look_at_the_books()

    async def _client(self, several: list[Asked]) -> None:
        bench = Bench(self._sessions, self.url)
        executor = await bench.register()
        for asked in several:
            payload = asked if isinstance(asked, Payload) else await asked()
            accepted = await bench.producer.enqueue(payload)
            await executor.deliver(accepted.job_id)

    # What the books must say

    async def _look_at_the_books(self) -> None:
        await self._no_error_reaches_a_user()
        await self._last_transfers_lead_to_the_teams()
        await self._no_role_is_left_behind()
        await self._before_images_lead_to_the_start()

    async def _no_error_reaches_a_user(self) -> None:
        bad = await self._connection.fetch(
            "SELECT kind, state, reason, error, attempt, payload FROM bulwark.job "
            "WHERE state <> 'succeeded' AND reason IS DISTINCT FROM 'rejected'"
        )
        assert bad == []
        uncounted = await self._connection.fetchval(
            "SELECT count(*) FROM bulwark.job AS j WHERE state = 'succeeded' AND EXISTS "
            "(SELECT FROM bulwark.chunk AS c WHERE c.job_id = j.id AND chunk_no > 0 AND rows - "
            "filtered <> (SELECT coalesce(sum(value::int), 0) FROM jsonb_each_text(counts)))"
        )
        assert uncounted == 0

    async def _last_transfers_lead_to_the_teams(self) -> None:
        astray = await self._connection.fetch(
            "SELECT DISTINCT ON (h.id) h.id, h.team_id, t.to_team_id FROM hero AS h "
            "JOIN transfer AS t ON t.hero_id = h.id ORDER BY h.id, t.id DESC"
        )
        assert [one for one in astray if one["team_id"] != one["to_team_id"]] == []
        broken = await self._connection.fetch(
            "SELECT * FROM (SELECT hero_id, from_team_id, lag(to_team_id) OVER w AS was, "
            "row_number() OVER w AS n FROM transfer WINDOW w AS (PARTITION BY hero_id ORDER BY id))"
            " AS t WHERE n > 1 AND was IS DISTINCT FROM from_team_id"
        )
        assert broken == []

    async def _no_role_is_left_behind(self) -> None:
        """All roles are older than any transfer here."""
        left = await self._connection.fetch(
            "SELECT m.id FROM membership AS m JOIN transfer AS t ON t.hero_id = m.hero_id "
            "AND t.from_team_id = m.team_id WHERE m.deleted_at IS NULL"
        )
        assert left == []
        lonely = await self._connection.fetch(
            "SELECT m.id FROM membership AS m JOIN hero AS h ON h.id = m.hero_id "
            "JOIN team AS t ON t.id = m.team_id WHERE m.deleted_at IS NULL "
            "AND (h.deleted_at IS NOT NULL OR t.deleted_at IS NOT NULL)"
        )
        assert lonely == []

    async def _before_images_lead_to_the_start(self) -> None:
        """Undone from the last change to the first, each row is what it was, or was inserted as."""
        lines = await self._lines()
        for table in TABLES:
            for key, row in (await self._rows(table)).items():
                undone = dict(row)
                for line in lines.pop((table, key), []):
                    assert line["version"] == undone["version"] - 1, (table, key, line)
                    undone |= {**line["before"], "version": line["version"]}
                assert undone["version"] == 1
                if key in self._start[table]:
                    then = self._start[table][key]
                    assert {n: v for n, v in undone.items() if n not in TIMES} == {
                        n: v for n, v in then.items() if n not in TIMES
                    }
                else:
                    assert undone.get("deleted_at") is None
        assert lines == {}

    async def _lines(self) -> dict[tuple[str, int], list[Row]]:
        """The audit of rows that were there, by table and key, the last change first."""
        found = await self._connection.fetch(
            "SELECT table_name, (keys -> 'keys' -> 0 ->> 0)::int AS key, version, before "
            "FROM bulwark.audit WHERE before IS NOT NULL ORDER BY version DESC"
        )
        lines: dict[tuple[str, int], list[Row]] = defaultdict(list)
        for one in found:
            line = {"version": one["version"], "before": one["before"]}
            lines[one["table_name"], one["key"]].append(line)
        return dict(lines)

    async def _rows(self, table: str) -> dict[int, Row]:
        """The rows by key, as the audit would write them."""
        await self._connection.set_type_codec(
            "jsonb", encoder=str, decoder=json.loads, schema="pg_catalog"
        )
        found = await self._connection.fetch(f"SELECT id, to_jsonb(t) AS row FROM {table} AS t")
        return {one["id"]: one["row"] for one in found}

    def teardown(self) -> None:
        if self._waiting:
            self._runner.run(self._go())
        self._runner.run(self._close())
        self._runner.close()

    async def _close(self) -> None:
        await self._connection.close()
        await self._engine.dispose()


@pytest.fixture
def machine(bulwark_databases: Databases) -> Iterator[type[Books]]:
    with bulwark_databases.fresh() as url:
        Books.url = url
        yield Books


def test_eight_clients_keep_the_books_right(machine: type[Books]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=5,
            stateful_step_count=100,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
