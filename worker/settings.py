"""Every setting of Bulwark, from BULWARK_ variables and the file .env of the current folder."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self
from urllib.parse import quote, urlsplit

from dotenv import dotenv_values
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from db.engine import PoolProfile
from db.ledger.rotation import ROTATED
from jobs._housekeeping import Housekeeping
from jobs._sources.object_store import SCHEMES
from worker.sentinel import (
    SENTINEL_SCHEMES,
    SENTINEL_URL_EXAMPLE,
    SentinelUrlError,
    parse_sentinel_url,
)

PREFIX = "BULWARK_"
TEST_PREFIX = "BULWARK_TEST_"
_FOR_TESTS = tuple(f"{TEST_PREFIX}{name}" for name in ("SERVERS", "DATABASE_URL", "REDIS_URL"))
ENV_FILE = Path(".env")
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
_REDIS_SCHEMES = ("redis", "rediss", "unix")
_PLAIN = {
    "bool_parsing": "it should be true or false",
    "int_parsing": "it should be a whole number",
    "float_parsing": "it should be a number",
}


class SettingsError(Exception):
    """The settings cannot be used; each problem is a sentence that names the variable."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(" ".join(self.problems))


class Servers(NamedTuple):
    """Where the two servers are, with their passwords: not to be shown."""

    database_url: str
    redis_url: str


def _items(value: object) -> object:
    """A list as a person types it: separated by commas, or as a JSON list."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"the JSON list is broken: {error}") from None
    return [item.strip() for item in value.split(",") if item.strip()]


def _objects(value: object) -> object:
    """What is written as one JSON object with an object under each name."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"the JSON is broken: {error}") from None
    if not (isinstance(found, dict) and all(isinstance(one, dict) for one in found.values())):
        raise ValueError('it should be JSON such as {"name": {"cron": "0 3 * * *"}}')
    return found


def _days(value: object) -> object:
    """Days by name as a person types them, hero=30,team=365, or as a JSON object."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"the JSON object is broken: {error}") from None
    pairs = [item.partition("=") for item in value.split(",") if item.strip()]
    for name, equals, days in pairs:
        if not name.strip() or not equals or not days.strip().isdecimal():
            text = f"{name}{equals}{days}".strip()
            raise ValueError(f"{text!r} is no name and days, such as hero=30")
    names = [name.strip() for name, _, _ in pairs]
    _distinct(tuple(names))
    return {name: int(days) for name, (_, _, days) in zip(names, pairs, strict=True)}


def _ledger_tables(days: dict[str, int]) -> dict[str, int]:
    known = (*ROTATED, "job", "parked")
    for name in days:
        if name not in known:
            raise ValueError(f"{name!r} is none of {', '.join(sorted(known))}")
    return days


def _lowered(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError("it names nothing; leave it out for the default")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} stands in it twice")
    return names


def check_postgres_url(secret: SecretStr, info: ValidationInfo) -> SecretStr:
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
            name = variable("database_password")
            raise ValueError(f"it names no user that {name} is the password of; {example}")
        url = url.set(password=password)
    return SecretStr(url.set(drivername=_DRIVER).render_as_string(hide_password=False))


def _set_beside(info: ValidationInfo, password: str) -> str | None:
    """The value of a password's setting, which stands before the URL that it belongs to."""
    secret: SecretStr | None = info.data.get(password)
    return None if secret is None else secret.get_secret_value()


def check_redis_url(secret: SecretStr, info: ValidationInfo) -> SecretStr:
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


def _module_name(name: str) -> str:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{name!r} is not the name of a Python module, such as shop.models")
    return name


def _queue_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", name):
        raise ValueError(f"{name!r} is not the name of a queue: letters, digits and _ . - only")
    return name


def _import_place(value: object) -> object:
    """A folder as its path; one of objects as the beginning of their URIs."""
    if not isinstance(value, str) or "://" not in value:
        return Path(str(value)).expanduser().absolute()
    scheme, _, place = value.partition("://")
    if scheme not in SCHEMES or not place.strip("/"):
        example = "/srv/incoming or s3://bucket/incoming"
        raise ValueError(f"{value!r} is no place of files or objects, such as {example}")
    return value


_ModuleName = Annotated[str, AfterValidator(_module_name)]
_QueueName = Annotated[str, AfterValidator(_queue_name)]
_Place = Annotated[Path | str, BeforeValidator(_import_place)]
_Seconds = Annotated[float, Field(allow_inf_nan=False)]
_List = (NoDecode, BeforeValidator(_items))
_Days = Annotated[
    dict[str, Annotated[int, Field(ge=0, le=36_500)]], NoDecode, BeforeValidator(_days)
]


class Settings(BaseSettings):
    """One process's settings, fixed from its start on."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=ENV_FILE,
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        validate_default=True,
    )

    database_password: SecretStr | None = Field(
        None, description="PostgreSQL's password, if its URL has none; any signs."
    )
    database_url: Annotated[SecretStr, AfterValidator(check_postgres_url)] | None = Field(
        None, description="PostgreSQL, where jobs and data are."
    )
    redis_password: SecretStr | None = Field(
        None, description="Redis' password, if its URL has none; any signs."
    )
    redis_url: Annotated[SecretStr, AfterValidator(check_redis_url)] | None = Field(
        None, description="Redis or Valkey, which carries the signals."
    )
    pool_profile: Annotated[PoolProfile, BeforeValidator(_lowered)] = Field(
        PoolProfile.MEDIUM, description="How many connections to PostgreSQL one process may hold."
    )
    pgbouncer: bool = Field(
        False, description="Whether PgBouncer in transaction mode stands before PostgreSQL."
    )
    queues: Annotated[tuple[_QueueName, ...], *_List, AfterValidator(_distinct)] = Field(
        ("default",), description="The queues that a worker serves."
    )
    max_jobs: int = Field(10, ge=1, le=1000, description="How many jobs one worker runs at a time.")
    beat_interval_s: _Seconds = Field(
        5.0, ge=0.1, le=300, description="How often a worker says that it lives."
    )
    lost_after_s: _Seconds = Field(
        15.0,
        ge=0.2,
        le=3600,
        description="After how long a silent worker's jobs are taken back; at least two beats.",
    )
    relay_interval_s: _Seconds = Field(
        1.0, ge=0.05, le=60, description="How often due jobs that no worker has heard are rung."
    )
    shutdown_grace_s: _Seconds = Field(
        5.0, ge=0, le=3600, description="How long a worker told to stop lets its jobs finish."
    )
    poll_interval_s: _Seconds = Field(
        0.5,
        ge=0.001,
        le=10,
        description="How often a worker looks for messages of plain arq clients.",
    )
    import_folders: Annotated[tuple[_Place, ...], *_List] = Field(
        (), description="Folders of files, or of objects, that a worker may read in place."
    )
    model_modules: Annotated[tuple[_ModuleName, ...], *_List] = Field(
        (), description="Python modules with models, besides those in db/models."
    )
    job_modules: Annotated[tuple[_ModuleName, ...], *_List] = Field(
        (), description="Python modules with jobs, besides those in jobs."
    )
    idempotency_retention_days: int = Field(
        7, ge=1, le=3650, description="How long an idempotency key is remembered."
    )
    schedules: Annotated[dict[str, dict[str, Any]], NoDecode, BeforeValidator(_objects)] = Field(
        {}, description="What is otherwise about schedules than their jobs declare."
    )
    retention_days: _Days = Field(
        {}, description="How long deleted rows are kept, by table; others are never purged."
    )
    archive_folders: Annotated[tuple[_Place, ...], *_List] = Field(
        (), description="Folders, or places of objects, for archives of what is purged."
    )
    ledger_retention_days: Annotated[_Days, AfterValidator(_ledger_tables)] = Field(
        {}, description="How long the ledger keeps its own rows, by table; others for good."
    )
    log_level: Annotated[
        Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lowered)
    ] = Field("info", description="The least important events that are logged.")
    log_format: Annotated[Literal["auto", "json", "console"], BeforeValidator(_lowered)] = Field(
        "auto", description="How events are written; auto is console on a terminal, else json."
    )
    redis_timeout_s: _Seconds = Field(
        5.0, ge=0.1, le=300, description="How long an answer from Redis may take."
    )

    @model_validator(mode="after")
    def _two_beats_before_lost(self) -> Self:
        least_s = 2 * self.beat_interval_s
        if self.lost_after_s < least_s:
            raise ValueError(
                f"{variable('lost_after_s')} is {self.lost_after_s:g}, which is less than two "
                f"beats of {variable('beat_interval_s')}; set it to {least_s:g} or more"
            )
        return self

    @property
    def housekeeping(self) -> Housekeeping:
        """What jobs are to know of it: how long things are kept, and where archives may be."""
        return Housekeeping(self.retention_days, self.ledger_retention_days, self.archive_folders)

    def require_database(self) -> str:
        """The address of PostgreSQL, for what needs no Redis. Raises SettingsError."""
        if self.database_url is None:
            place = "in the environment or in .env; `bulwark dev` prints the one that it uses"
            name = variable("database_url")
            raise SettingsError([f"Set {name} (such as {DATABASE_URL_EXAMPLE}) {place}."])
        return self.database_url.get_secret_value()

    def require_servers(self) -> Servers:
        """The addresses of both servers. Raises SettingsError that says which to set, and how."""
        missing = [
            f"{variable(name)} (such as {example})"
            for name, example, value in (
                ("database_url", DATABASE_URL_EXAMPLE, self.database_url),
                ("redis_url", REDIS_URL_EXAMPLE, self.redis_url),
            )
            if value is None
        ]
        if self.database_url is None or self.redis_url is None:
            sentence = f"Set {' and '.join(missing)} in the environment or in .env, or use"
            raise SettingsError([f"{sentence} `bulwark dev`, which runs without."])
        return Servers(self.database_url.get_secret_value(), self.redis_url.get_secret_value())


def variable(field_name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + field_name.upper()


def load_settings() -> Settings:
    """Read the environment, and .env for what it does not say.

    Raises SettingsError for every variable that is unknown or has a value that cannot be used.
    """
    from_file = _read_env_file()
    problems = [*unknown_variables(os.environ), *unknown_variables(from_file, f" in {ENV_FILE}")]
    try:
        settings = Settings()
    except ValidationError as error:
        raise SettingsError([*problems, *sentences(error)]) from None
    if problems:
        raise SettingsError(problems)
    return settings


def _read_env_file() -> Mapping[str, str | None]:
    try:
        return dotenv_values(ENV_FILE, encoding="utf-8") if ENV_FILE.is_file() else {}
    except UnicodeDecodeError as error:
        raise SettingsError([f"The file {ENV_FILE} is not UTF-8 at byte {error.start}."]) from None
    except OSError as error:
        raise SettingsError([f"The file {ENV_FILE} cannot be read: {error.strerror}."]) from None


def unknown_variables(given: Mapping[str, str | None], place: str = "") -> list[str]:
    """A sentence for each variable that looks like a setting and is none, or has no value."""
    known = [*(variable(name) for name in Settings.model_fields), *_FOR_TESTS]
    problems = []
    for name, value in given.items():
        if not name.upper().startswith(PREFIX):
            continue
        if name not in known:
            problems.append(f"{name}{place} is not a setting{_nearest(name, known)}")
        elif value is None:
            problems.append(f"{name}{place} has no value: write {name}=value.")
    return problems


def _nearest(name: str, known: list[str]) -> str:
    names = [one.removeprefix(PREFIX) for one in known]
    near = get_close_matches(name.upper().removeprefix(PREFIX), names, n=1)
    return f": did you mean {PREFIX}{near[0]}?" if near else f"; there are {', '.join(known)}."


def sentences(error: ValidationError, prefix: str = PREFIX) -> list[str]:
    """One sentence for each setting that is wrong."""
    by_variable: dict[str, str] = {}
    for problem in error.errors(include_url=False, include_context=True, include_input=False):
        subject = f"{prefix}{str(problem['loc'][0]).upper()}: " if problem["loc"] else ""
        by_variable.setdefault(subject, f"{subject}{_complaint(problem)}.")
    return list(by_variable.values())


def _complaint(problem: ErrorDetails) -> str:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return _PLAIN.get(problem["type"]) or problem["msg"].replace("Input should", "it should")
