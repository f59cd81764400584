"""The servers' addresses as settings: what is wrong with one is said without repeating it."""

import re
from typing import Annotated
from urllib.parse import quote, urlsplit

from pydantic import AfterValidator, SecretStr, ValidationInfo
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from worker.sentinel import (
    SENTINEL_SCHEMES,
    SENTINEL_URL_EXAMPLE,
    SentinelUrlError,
    parse_sentinel_url,
)

DATABASE_URL_EXAMPLE = "postgresql://user:password@localhost:5432/bulwark"
REDIS_URL_EXAMPLE = "redis://localhost:6379/0"

_DRIVER = "postgresql+asyncpg"
_NOT_OF_ASYNCPG = {
    "sslmode": "write ssl=",
    "sslrootcert": "set PGSSLROOTCERT",
    "sslcert": "set PGSSLCERT",
    "sslkey": "set PGSSLKEY",
    "connect_timeout": "write timeout=",
    "application_name": "leave it out",
}
_TLS_IF_ASKED = ("require", "true")
_TLS_LEAVES_OUT = {
    "ssl_check_hostname": ("false", "verify-ca"),
    "ssl_cert_reqs": ("none", "require"),
}
"""What may be forgone, by the options that redis-py has for it, and asyncpg's name for the rest."""
_REDIS_SCHEMES = ("redis", "rediss", "unix")


def _postgres_url(secret: SecretStr, info: ValidationInfo) -> SecretStr:
    """The URL with the driver that Bulwark uses, and with the password that is set beside it.

    Errors never repeat it: it may hold a password.
    """
    example = f"write it as {DATABASE_URL_EXAMPLE}"
    try:
        url = make_url(secret.get_secret_value())
    except (ArgumentError, ValueError):
        raise ValueError(f"it is not a URL; {example}") from None
    if url.drivername not in ("postgresql", _DRIVER):
        raise ValueError(f"its scheme is {url.drivername!r}; {example}")
    if not url.database:
        raise ValueError(f"it names no database; {example}")
    for option in url.query:
        if remedy := _NOT_OF_ASYNCPG.get(option):
            raise ValueError(f"its option {option!r} is unknown to the driver asyncpg; {remedy}")
    password = _set_beside(info, "database_password")
    if password is not None and url.password is None:
        if url.username is None:
            name = "BULWARK_DATABASE_PASSWORD"
            raise ValueError(f"it names no user that {name} is the password of; {example}")
        url = url.set(password=password)
    url = _believing_its_host_alone(url)
    return SecretStr(url.set(drivername=_DRIVER).render_as_string(hide_password=False))


def _believing_its_host_alone(url: URL) -> URL:
    """With TLS the certificate must be of a known authority and of the host, as with Redis.

    asyncpg, like libpq, believes anybody where TLS is only required.
    """
    mode = url.query.get("ssl")
    forgone = {option: url.query[option] for option in _TLS_LEAVES_OUT if option in url.query}
    for option, value in forgone.items():
        only = _TLS_LEAVES_OUT[option][0]
        if value != only or mode not in _TLS_IF_ASKED:
            raise ValueError(
                f"its option {option!r} is only for {option}={only} beside ssl=require"
            )
    if mode not in _TLS_IF_ASKED:
        return url
    modes = [_TLS_LEAVES_OUT[option][1] for option in forgone]
    url = url.difference_update_query(forgone)
    return url.update_query_dict({"ssl": modes[-1] if modes else "verify-full"})


def _set_beside(info: ValidationInfo, password: str) -> str | None:
    """The value of a password's setting, which stands before the URL that it belongs to."""
    secret: SecretStr | None = info.data.get(password)
    return None if secret is None else secret.get_secret_value()


def _redis_url(secret: SecretStr, info: ValidationInfo) -> SecretStr:
    """The URL with the password that is set beside it. Errors never repeat it."""
    text = secret.get_secret_value()
    if text.startswith(SENTINEL_SCHEMES):
        _require_sentinels(text)
    else:
        _require_redis(text)
    url = urlsplit(text)
    password = _set_beside(info, "redis_password")
    if password is None or url.password is not None:
        return secret
    user, _, address = url.netloc.rpartition("@")
    return SecretStr(url._replace(netloc=f"{user}:{quote(password, safe='')}@{address}").geturl())


def _require_redis(text: str) -> None:
    example = f"write it as {REDIS_URL_EXAMPLE}"
    try:
        url = urlsplit(text)
        address = url.path if url.scheme == "unix" else url.hostname
        _ = url.port
    except ValueError:
        raise ValueError(f"it is not a URL; {example}") from None
    if url.scheme not in _REDIS_SCHEMES:
        raise ValueError(f"its scheme is {url.scheme!r}; {example}")
    if not address:
        raise ValueError(f"it names no server; {example}")
    if url.scheme != "unix" and not re.fullmatch(r"(/\d*)?", url.path):
        raise ValueError(f"its database {url.path[1:]!r} is not a number; {example}")


def _require_sentinels(text: str) -> None:
    try:
        parse_sentinel_url(text)
    except SentinelUrlError as error:
        raise ValueError(f"{error}; write it as {SENTINEL_URL_EXAMPLE}") from None


PostgresUrl = Annotated[SecretStr, AfterValidator(_postgres_url)]
RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]
