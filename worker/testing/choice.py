"""Which servers the tests use, as the BULWARK_TEST_ variables say."""

import os
from enum import StrEnum

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from worker.addresses import PostgresUrl, RedisUrl
from worker.sentinel import SENTINEL_SCHEMES
from worker.settings import (
    TEST_PREFIX,
    SettingsError,
    sentences,
    unknown_variables,
)

POSTGRES_IMAGE = "postgres:18"
REDIS_IMAGE = "valkey/valkey:9"


class Source(StrEnum):
    """Where servers come from."""

    EMBEDDED = "embedded"
    CONTAINERS = "containers"
    URL = "url"


class ServerChoice(BaseSettings):
    """The servers of one test run."""

    model_config = SettingsConfigDict(
        env_prefix=TEST_PREFIX, env_ignore_empty=True, frozen=True, hide_input_in_errors=True
    )

    servers: Source = Source.EMBEDDED
    database_url: PostgresUrl | None = None
    redis_url: RedisUrl | None = None
    postgres_image: str = Field(POSTGRES_IMAGE, validation_alias="POSTGRES_IMAGE")
    redis_image: str = Field(REDIS_IMAGE, validation_alias="REDIS_IMAGE")


def choose_servers() -> ServerChoice:
    """Read the environment. Raises SettingsError, a sentence for each problem."""
    problems = [*unknown_variables(os.environ)]
    try:
        choice = ServerChoice()
    except ValidationError as error:
        raise SettingsError([*problems, *sentences(error, TEST_PREFIX)]) from None
    if choice.servers is Source.URL and (choice.database_url is None or choice.redis_url is None):
        problems.append(
            f"{TEST_PREFIX}SERVERS=url needs {TEST_PREFIX}DATABASE_URL, where databases are made, "
            f"and {TEST_PREFIX}REDIS_URL, whose databases are emptied: set both."
        )
    if choice.redis_url is not None and _is_behind_sentinel(choice.redis_url.get_secret_value()):
        problems.append(
            f"{TEST_PREFIX}REDIS_URL: tests empty databases of a Redis that they reach by itself, "
            "not behind Sentinel; name its master's address."
        )
    if problems:
        raise SettingsError(problems)
    return choice


def _is_behind_sentinel(url: str) -> bool:
    return url.startswith(tuple(f"{scheme}://" for scheme in SENTINEL_SCHEMES))
