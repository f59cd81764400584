"""Connections as PostgreSQL sees them, and the pool as its owner sees it."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import JSON, bindparam, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from db import engine as engine_module
from db.engine import PoolProfile, PoolStatus, create_engine, make_sessions, pool_status
from db.models.team import Team
from db.retry import Fault, classify, describe, sqlstate
from tests.proxy import hushable


@asynccontextmanager
async def opened(
    url: str,
    *,
    profile: PoolProfile = PoolProfile.LIGHT,
    application_name: str = "test",
    connect_timeout_s: float = 10.0,
    command_timeout_s: float | None = None,
    pgbouncer: bool = False,
) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(
        url,
        profile=profile,
        application_name=application_name,
        connect_timeout_s=connect_timeout_s,
        command_timeout_s=command_timeout_s,
        pgbouncer=pgbouncer,
    )
    try:
        yield engine
    finally:
        await engine.dispose()


async def fetch(engine: AsyncEngine, sql: str, **parameters: Any) -> Any:
    async with engine.connect() as connection:
        return await connection.scalar(text(sql), parameters)


async def connection_error(url: str, *, connect_timeout_s: float = 10.0) -> DBAPIError:
    async with opened(url, connect_timeout_s=connect_timeout_s) as engine:
        with pytest.raises(DBAPIError) as raised:
            await fetch(engine, "SELECT 1")
    return raised.value


@pytest.mark.parametrize(
    ("profile", "size", "capacity"),
    [(PoolProfile.LIGHT, 5, 10), (PoolProfile.MEDIUM, 15, 25), (PoolProfile.HEAVY, 25, 25)],
)
async def test_a_profile_decides_how_many_connections_there_may_be(
    database_url: str, profile: PoolProfile, size: int, capacity: int
) -> None:
    async with opened(database_url, profile=profile) as engine:
        status = pool_status(engine)

    assert (status.size, status.capacity) == (size, capacity)


async def test_pool_status_counts_connections_in_use_idle_and_above_the_size(
    database_url: str,
) -> None:
    async with opened(database_url, profile=PoolProfile.LIGHT) as engine:
        connections = [await engine.connect() for _ in range(7)]
        busy = pool_status(engine)
        for connection in connections:
            await connection.close()
        rested = pool_status(engine)

    assert busy == PoolStatus(size=5, checked_out=7, overflow=2, idle=0, capacity=10)
    assert rested == PoolStatus(size=5, checked_out=0, overflow=0, idle=5, capacity=10)


@pytest.mark.parametrize("pgbouncer", [False, True])
async def test_postgresql_knows_the_connection_by_its_application_name(
    database_url: str, pgbouncer: bool
) -> None:
    async with opened(database_url, application_name="bulwark:4711", pgbouncer=pgbouncer) as engine:
        name = await fetch(
            engine, "SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()"
        )

    assert name == "bulwark:4711"


async def test_postgresql_ends_a_session_whose_client_is_gone_within_half_a_minute(
    database_url: str,
) -> None:
    async with opened(database_url) as engine:
        if await fetch(engine, "SELECT inet_client_addr() IS NULL"):
            pytest.skip("this server is reached by a Unix socket, and keepalives are of TCP")
        waits_s, between_s, times, unheard_ms = [
            int(
                await fetch(engine, "SELECT setting FROM pg_settings WHERE name = :name", name=name)
            )
            for name in (
                "tcp_keepalives_idle",
                "tcp_keepalives_interval",
                "tcp_keepalives_count",
                "tcp_user_timeout",
            )
        ]
        assert waits_s + between_s * times <= 30
        assert 0 < unheard_ms <= 30_000


async def test_an_error_does_not_show_the_parameters(database_url: str) -> None:
    async with opened(database_url) as engine:
        with pytest.raises(DBAPIError) as raised:
            await fetch(
                engine, "SELECT 1 / CAST(:zero AS int), CAST(:text AS text)", zero=0, text="elvira"
            )

    assert sqlstate(raised.value) == "22012"
    assert "elvira" not in str(raised.value)


async def test_json_is_sent_without_spaces_and_escapes(database_url: str) -> None:
    statement = text("SELECT CAST(:document AS json)::text").bindparams(
        bindparam("document", type_=JSON)
    )
    async with opened(database_url) as engine, engine.connect() as connection:
        sent = await connection.scalar(statement, {"document": {"name": "Zoë", "ids": [1, 2]}})

    assert sent == '{"name":"Zoë","ids":[1,2]}'


NAMED_STATEMENTS = "SELECT count(*) FROM pg_prepared_statements WHERE name <> ''"


@pytest.mark.parametrize(("pgbouncer", "leaves_some"), [(False, True), (True, False)])
async def test_behind_pgbouncer_no_named_statement_is_left_on_the_server(
    database_url: str, pgbouncer: bool, leaves_some: bool
) -> None:
    async with (
        opened(database_url, pgbouncer=pgbouncer) as engine,
        engine.connect() as connection,
    ):
        for number in range(3):
            await connection.scalar(text(f"SELECT {number} + CAST(:n AS int)"), {"n": number})
        counted = await connection.scalar(text(NAMED_STATEMENTS))

    assert (counted > 0) is leaves_some


async def test_behind_pgbouncer_a_type_unknown_to_the_driver_can_be_read(
    database_url: str,
) -> None:
    async with opened(database_url, pgbouncer=True) as engine, engine.connect() as connection:
        await connection.execute(text("CREATE TYPE mood AS ENUM ('calm', 'wild')"))
        statement = text("SELECT ARRAY[CAST(:mood AS mood)]")
        moods = [await connection.scalar(statement, {"mood": m}) for m in ("calm", "wild")]

    assert moods == [["calm"], ["wild"]]


async def test_objects_stay_readable_after_a_commit(database_url: str) -> None:
    async with opened(database_url) as engine:
        async with make_sessions(engine)() as session:
            team = Team(name="Preventers")
            session.add(team)
            await session.commit()
        status = pool_status(engine)

        assert team.name == "Preventers"
        assert team.id is not None
        assert status.checked_out == 0


async def test_a_missing_socket_is_an_outage(tmp_path: Path, database_url: str) -> None:
    url = make_url(database_url).update_query_dict({"host": str(tmp_path)})

    error = await connection_error(url.render_as_string(hide_password=False))

    assert (sqlstate(error), classify(error)) == ("08001", Fault.OUTAGE)
    assert describe(error).startswith("ClientCannotConnectError: PostgreSQL cannot be reached: ")
    assert "No such file or directory" in describe(error)


async def test_a_refused_connection_is_an_outage(unused_tcp_port: int) -> None:
    error = await connection_error(f"postgresql+asyncpg://u@127.0.0.1:{unused_tcp_port}/d")

    assert (sqlstate(error), classify(error)) == ("08001", Fault.OUTAGE)


async def test_an_unknown_host_is_an_outage() -> None:
    error = await connection_error("postgresql+asyncpg://u@no-such-host.invalid/d")

    assert (sqlstate(error), classify(error)) == ("08001", Fault.OUTAGE)


async def test_a_server_that_never_answers_is_an_outage_after_the_connect_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and is never accepted
        port = silent.getsockname()[1]
        error = await connection_error(
            f"postgresql+asyncpg://u@127.0.0.1:{port}/d?ssl=disable", connect_timeout_s=0.05
        )

    assert (sqlstate(error), classify(error)) == ("08001", Fault.OUTAGE)
    assert "no answer within 0.05 s" in describe(error)


async def test_a_missing_database_is_no_outage(database_url: str) -> None:
    url = make_url(database_url).set(database="no_such_database")

    error = await connection_error(url.render_as_string(hide_password=False))

    assert (sqlstate(error), classify(error)) == ("3D000", Fault.OTHER)


async def test_a_statement_over_the_command_timeout_is_no_outage(database_url: str) -> None:
    async with opened(database_url, command_timeout_s=0.05) as engine:
        with pytest.raises(TimeoutError) as raised:
            await fetch(engine, "SELECT pg_sleep(60)")  # what is cut short

    assert classify(raised.value) is Fault.OTHER


async def test_a_pooled_connection_that_died_is_replaced_before_use(database_url: str) -> None:
    async with opened(database_url) as engine, opened(database_url) as other:
        first = await fetch(engine, "SELECT pg_backend_pid()")
        await fetch(other, "SELECT pg_terminate_backend(:pid, 5000)", pid=first)

        second = await fetch(engine, "SELECT pg_backend_pid()")

    assert second != first


async def test_a_pooled_connection_that_is_mute_when_it_was_idle_is_cut_and_replaced(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something between still acknowledges what is sent, so that no clock of TCP ends it."""
    monkeypatch.setattr(engine_module, "PING_AFTER_S", 0.0)
    monkeypatch.setattr(engine_module, "PING_TIMEOUT_S", 0.2)
    async with hushable(database_url) as (wire, way), opened(way) as engine:
        first = await fetch(engine, "SELECT pg_backend_pid()")
        wire.hush()
        wire.mend()
        async with asyncio.timeout(60):
            second = await fetch(engine, "SELECT pg_backend_pid()")

    assert second != first


async def test_the_connection_used_last_is_used_next_so_that_others_may_rest(
    database_url: str,
) -> None:
    async with opened(database_url) as engine:
        connections = [await engine.connect() for _ in range(3)]
        pids = [await c.scalar(text("SELECT pg_backend_pid()")) for c in connections]
        for connection in connections:
            await connection.close()

        assert await fetch(engine, "SELECT pg_backend_pid()") == pids[-1]
