"""What a client makes of the address of Redis, before it opens anything."""

import pytest
from redis.asyncio.sentinel import SentinelManagedConnection, SentinelManagedSSLConnection

from worker.redis_pool import make_redis
from worker.sentinel import MasterPool, parse_sentinel_url


@pytest.mark.parametrize(
    ("url", "sentinels", "master", "master_url"),
    [
        ("redis+sentinel://one/m", [("one", 26379)], "m", "redis://master"),
        (
            "redis+sentinel://u:p%40@one:1,two,[::1]:3/m/2?sentinel_password=s",
            [("one", 1), ("two", 26379), ("::1", 3)],
            "m",
            "redis://u:p%40@master/2?sentinel_password=s",
        ),
        ("rediss+sentinel://:p@one:1/m/0", [("one", 1)], "m", "rediss://:p@master/0"),
    ],
)
def test_an_address_with_sentinels_is_taken_apart(
    url: str, sentinels: list[tuple[str, int]], master: str, master_url: str
) -> None:
    assert parse_sentinel_url(url) == (sentinels, master, master_url)


def test_master_and_sentinels_have_passwords_and_databases_of_their_own() -> None:
    url = "redis+sentinel://u:p%40@one:1,two/m/2?sentinel_password=s%20s"
    pool = make_redis(url, 3.0).connection_pool
    assert isinstance(pool, MasterPool)
    assert pool.connection_class is SentinelManagedConnection
    to_master = pool.connection_kwargs
    assert (to_master["username"], to_master["password"], to_master["db"]) == ("u", "p@", 2)
    for sentinel in pool.sentinel_manager.sentinels:
        to_sentinel = sentinel.connection_pool.connection_kwargs
        assert (to_sentinel["username"], to_sentinel["password"]) == (None, "s s")
        assert (to_sentinel["db"], to_sentinel["socket_timeout"]) == (0, 3.0)


@pytest.mark.parametrize(
    ("query", "checks"),
    [
        ("", True),
        ("?ssl_ca_certs=/ca.pem", True),
        ("?ssl_check_hostname=false", False),
        ("?ssl_cert_reqs=none", False),
    ],
)
def test_with_tls_the_host_is_checked_unless_the_address_says_otherwise(
    query: str, checks: bool
) -> None:
    direct = make_redis(f"rediss://one:1/0{query}", 3.0).connection_pool
    assert direct.connection_kwargs["ssl_check_hostname"] is checks
    behind = make_redis(f"rediss+sentinel://one:1/m/0{query}", 3.0).connection_pool
    assert isinstance(behind, MasterPool)
    assert behind.connection_class is SentinelManagedSSLConnection
    for kwargs in (
        behind.connection_kwargs,
        behind.sentinel_manager.sentinels[0].connection_pool.connection_kwargs,
    ):
        assert kwargs["ssl_check_hostname"] is checks
