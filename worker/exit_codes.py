"""How the command line ends: its exit codes, and the one sentence for each error that is known."""

import errno
from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import NamedTuple

from pydantic import ValidationError
from redis.exceptions import RedisError

from db.errors import BulwarkError, NotAtHead
from db.retry import DATABASE_ERRORS, Fault, classify, describe, sqlstate
from jobs._errors import JobError, SourceAway
from jobs._problems import problems_of, said
from worker.embedded import EmbeddedServerError
from worker.redis_pool import EvictingRedis
from worker.settings import SettingsError

_NO_RIGHT = "42501"
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSED_LOGIN = ("28", "3D")  # invalid authorization; no such database


class ExitCode(IntEnum):
    """What the command line tells the shell."""

    OK = 0
    FAILED = 1
    BAD_INPUT = 2
    UNREACHABLE = 3
    NOT_READY = 4
    NOT_WHOLE = 5
    INTERRUPTED = 130


class BadInput(Exception):
    """What was asked for does not exist or cannot be done as it was asked for."""


class PartlyDone(Exception):
    """What was done when `cause` kept the rest from being done."""

    def __init__(self, done: str, cause: Exception) -> None:
        super().__init__(done)
        self.cause = cause


_CODES = (
    ((SettingsError, NotAtHead, EvictingRedis), ExitCode.NOT_READY),
    ((EmbeddedServerError, SourceAway), ExitCode.UNREACHABLE),
    ((BadInput, JobError, BulwarkError), ExitCode.BAD_INPUT),
)


KNOWN_ERRORS = (
    BadInput,
    PartlyDone,
    SettingsError,
    EmbeddedServerError,
    JobError,
    BulwarkError,
    RedisError,
    *DATABASE_ERRORS,
)
"""Among these are all that `explain` has a sentence for."""


class Failure(NamedTuple):
    """An error as its user sees it."""

    code: ExitCode
    sentence: str


def explain(error: Exception) -> Failure | None:
    """What to tell about an error that a user can do something about; None for any other."""
    if isinstance(error, PartlyDone):
        failure = explain(error.cause)
        return failure and Failure(failure.code, f"{error}: {failure.sentence}")
    if isinstance(error, RedisError):
        return Failure(ExitCode.UNREACHABLE, unreachable_redis(error))
    if isinstance(error, DATABASE_ERRORS) and _is_server_away(error):
        return Failure(ExitCode.UNREACHABLE, unreachable_postgres(error))
    if isinstance(error, DATABASE_ERRORS) and sqlstate(error) == _NO_RIGHT:
        sentence = f"{unreachable_postgres(error)}; docs/permissions.md says what each role may do"
        return Failure(ExitCode.BAD_INPUT, sentence)
    if isinstance(error, OSError) and has_no_room(error):
        sentence = f"The output cannot be written: {error.strerror}."
        return Failure(ExitCode.BAD_INPUT, sentence)
    for kinds, code in _CODES:
        if isinstance(error, kinds):
            return Failure(code, _one_line(error))
    return None


def has_no_room(error: OSError) -> bool:
    """Whether it says that a file may not grow: the disk is full, or some limit is reached."""
    return error.errno in _NO_ROOM


def first_problem(
    error: ValidationError, options: Mapping[str, str] = MappingProxyType({"constants": "--set"})
) -> str:
    """The first thing that options are refused for; a field is named as its option is typed.

    `options` are those that have another name than their field.
    """
    problem = problems_of(error)[0]
    fields = [str(field) for field in problem["loc"][:1]]
    named = [options.get(field, f"--{field.replace('_', '-')}") for field in fields]
    return ": ".join([*named, said(problem)])


def unreachable_postgres(error: Exception) -> str:
    name, _, reason = describe(error).partition(": ")
    reason = reason or name
    return reason if reason.startswith("PostgreSQL") else f"PostgreSQL refuses: {reason}"


def unreachable_redis(error: RedisError) -> str:
    return f"Redis cannot be used: {_one_line(error) or type(error).__name__}"


def _is_server_away(error: Exception) -> bool:
    state = sqlstate(error) or ""
    return classify(error) is Fault.OUTAGE or state.startswith(_REFUSED_LOGIN)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
