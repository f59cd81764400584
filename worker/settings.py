"""Every setting of Bulwark, from BULWARK_ variables and the file .env of the current folder."""

import os
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from dotenv import dotenv_values
from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from db.engine import PoolProfile
from jobs._housekeeping import Housekeeping
from worker.addresses import (
    DATABASE_URL_EXAMPLE,
    REDIS_URL_EXAMPLE,
    PostgresUrl,
    RedisUrl,
)
from worker.setting_values import (
    Days,
    Distinct,
    LedgerDays,
    Lowered,
    ManyOf,
    ModuleName,
    Objects,
    Place,
    QueueName,
    SealKeys,
    Seconds,
)

PREFIX = "BULWARK_"
TEST_PREFIX = "BULWARK_TEST_"
_FOR_TESTS = tuple(f"{TEST_PREFIX}{name}" for name in ("SERVERS", "DATABASE_URL", "REDIS_URL"))
ENV_FILE = Path(".env")

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
    database_url: PostgresUrl | None = Field(
        None, description="PostgreSQL, where jobs and data are."
    )
    redis_password: SecretStr | None = Field(
        None, description="Redis' password, if its URL has none; any signs."
    )
    redis_url: RedisUrl | None = Field(
        None, description="Redis or Valkey, which carries the signals."
    )
    listen_url: PostgresUrl | None = Field(
        None, description="PostgreSQL itself, to hear at once of what SQL enqueues."
    )
    pool_profile: Annotated[PoolProfile, Lowered] = Field(
        PoolProfile.MEDIUM, description="How many connections to PostgreSQL one process may hold."
    )
    pgbouncer: bool = Field(False, description="Whether PgBouncer stands before PostgreSQL.")
    queues: Annotated[tuple[QueueName, ...], *ManyOf, Distinct] = Field(
        ("default",), description="The queues that a worker serves."
    )
    max_jobs: int = Field(10, ge=1, le=1000, description="How many jobs one worker runs at a time.")
    bulk_slots: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="How many of them may be of a priority below 0, as bulk jobs are; "
        "if not set, four of five.",
    )
    beat_interval_s: Seconds = Field(
        5.0, ge=0.1, le=300, description="How often a worker says that it lives."
    )
    lost_after_s: Seconds = Field(
        15.0,
        ge=0.2,
        le=3600,
        description="After how long a silent worker's jobs are taken back; at least two beats.",
    )
    relay_interval_s: Seconds = Field(
        1.0, ge=0.05, le=60, description="How often due jobs that no worker has heard are rung."
    )
    shutdown_grace_s: Seconds = Field(
        5.0,
        ge=0,
        le=3600,
        description="How long a worker told to stop lets its jobs, or their chunks, finish.",
    )
    poll_interval_s: Seconds = Field(
        0.5,
        ge=0.001,
        le=10,
        description="How often a worker looks for messages of plain arq clients.",
    )
    import_folders: Annotated[tuple[Place, ...], *ManyOf] = Field(
        (), description="Folders of files, or of objects, that a worker may read in place."
    )
    model_modules: Annotated[tuple[ModuleName, ...], *ManyOf] = Field(
        (), description="Python modules with models, besides those in db/models."
    )
    job_modules: Annotated[tuple[ModuleName, ...], *ManyOf] = Field(
        (), description="Python modules with jobs, besides those in jobs."
    )
    idempotency_retention_days: int = Field(
        7, ge=1, le=3650, description="How long an idempotency key is remembered."
    )
    schedules: Objects = Field(
        {}, description="What is otherwise about schedules than their jobs declare."
    )
    retention_days: Days = Field(
        {}, description="How long deleted rows are kept, by table; others are never purged."
    )
    archive_folders: Annotated[tuple[Place, ...], *ManyOf] = Field(
        (), description="Folders, or places of objects, for archives of what is purged."
    )
    ledger_retention_days: LedgerDays = Field(
        {}, description="How long the ledger keeps its own rows, by table; others for good."
    )
    seal_key: SealKeys | None = Field(
        None, description="What signs the seals of the audit; 32 signs or more, best random ones."
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error", "critical"], Lowered] = Field(
        "info", description="The least important events that are logged."
    )
    log_format: Annotated[Literal["auto", "json", "console"], Lowered] = Field(
        "auto", description="How events are written; auto is console on a terminal, else json."
    )
    redis_timeout_s: Seconds = Field(
        1.5,
        ge=0.1,
        le=300,
        description="How long an answer from Redis may take; at a worker's start 10 s or more.",
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
        return Housekeeping(
            self.retention_days,
            self.ledger_retention_days,
            self.archive_folders,
            self.seal_keys,
        )

    @property
    def seal_keys(self) -> tuple[str, ...]:
        """The keys of the seals, not to be shown: the one that signs, and those of before."""
        return () if self.seal_key is None else tuple(self.seal_key.get_secret_value().split())

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
    known = [*(variable(name) for name in Settings.model_fields), *(() if place else _FOR_TESTS)]
    problems = []
    for name, value in given.items():
        if not name.upper().startswith(PREFIX):
            continue
        if place and name in _FOR_TESTS:
            problems.append(f"{name}{place} is not read: set it in the environment itself.")
        elif name not in known:
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
