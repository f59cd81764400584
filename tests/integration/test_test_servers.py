"""What the tests' databases and Redis are made of: copies of a template, and few numbers."""

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
import redis

from tests.stage import connected
from worker.testing.databases import Databases
from worker.testing.servers import RedisDatabases, Servers

COUNT = "SELECT count(*) FROM pg_database WHERE datname LIKE 'bulwark_test_%'"


@pytest.fixture
def redis_server(bulwark_redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(bulwark_redis_url) as client:
        yield client


async def test_a_template_that_fails_is_made_anew_by_the_next_test_and_leaves_nothing(
    bulwark_servers: Servers,
) -> None:
    prepared = []

    def prepare(url: str) -> None:
        prepared.append(url)
        raise ValueError("the schema is broken")

    databases = Databases(bulwark_servers.database_url, prepare)
    async with connected(bulwark_servers.database_url) as connection:
        before = await connection.fetchval(COUNT)
        for _ in range(2):
            with pytest.raises(ValueError, match="the schema is broken"), databases.fresh():
                pass
        databases.close()
        assert await connection.fetchval(COUNT) == before
    assert len(prepared) == 2


async def test_a_copy_has_what_the_template_has_and_goes_with_its_connections(
    bulwark_servers: Servers, bulwark_databases: Databases
) -> None:
    with bulwark_databases.fresh() as url:
        async with connected(url) as left_open:
            assert await left_open.fetchval("SELECT count(*) FROM bulwark.job") == 0
            name = await left_open.fetchval("SELECT current_database()")
    async with connected(bulwark_servers.database_url) as connection:
        there = "SELECT count(*) FROM pg_database WHERE datname = $1"
        assert await connection.fetchval(there, name) == 0


@pytest.mark.parametrize(
    ("url", "first"),
    [
        ("redis://:secret@cache:6379", "redis://:secret@cache:6379/3"),
        ("redis://cache/7?protocol=3", "redis://cache/3?protocol=3"),
        ("redis://cache?db=5", "redis://cache/3"),
        ("unix:///run/valkey.sock?db=5", "unix:///run/valkey.sock?db=3"),
    ],
)
def test_the_number_of_a_redis_database_goes_where_its_url_has_it(url: str, first: str) -> None:
    assert RedisDatabases(url, [3]).url(3) == first


def test_redis_databases_come_round_empty_but_those_that_are_kept(
    redis_server: redis.Redis, bulwark_redis_url: str
) -> None:
    redis_server.set("left", "behind")
    number = int(urlsplit(bulwark_redis_url).path[1:])
    databases = RedisDatabases(bulwark_redis_url, [number, number + 1])
    with databases.kept() as kept:
        assert kept == bulwark_redis_url
        assert redis_server.exists("left") == 0
        assert [databases.next(), databases.next()] == [databases.url(number + 1)] * 2
    assert {databases.next(), databases.next()} == {kept, databases.url(number + 1)}
