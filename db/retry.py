"""Which database errors deserve another try, and how long to wait before it."""

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

import asyncpg
from sqlalchemy.exc import (
    DBAPIError,
    EmulatedDBAPIException,
    SQLAlchemyError,
    StatementError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from tenacity import AsyncRetrying, RetryCallState, wait_random_exponential

from db.errors import CommitUnknown, Race

DATABASE_ERRORS = (
    SQLAlchemyError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    CommitUnknown,
    Race,
)
"""What a transaction can raise that `classify` knows more about than OTHER."""


class Fault(Enum):
    """What an error says about trying again."""

    CONTENTION = "contention"
    OUTAGE = "outage"
    STALE_PLAN = "stale_plan"
    INTEGRITY = "integrity"
    OTHER = "other"


_FAULT_BY_SQLSTATE: Mapping[str, Fault] = MappingProxyType(
    {
        "0A000": Fault.STALE_PLAN,
        "25006": Fault.OUTAGE,  # read-only: the primary has become a standby
        "25P03": Fault.OUTAGE,
        "25P04": Fault.OUTAGE,
        "40001": Fault.CONTENTION,
        "40P01": Fault.CONTENTION,
        "55P03": Fault.CONTENTION,
        "57P01": Fault.OUTAGE,
        "57P02": Fault.OUTAGE,
        "57P03": Fault.OUTAGE,
        "57P04": Fault.OUTAGE,
        "57P05": Fault.OUTAGE,
    }
)
_FAULT_BY_CLASS: Mapping[str, Fault] = MappingProxyType(
    {"08": Fault.OUTAGE, "23": Fault.INTEGRITY, "53": Fault.OUTAGE}
)
_QUOTED = re.compile(r'".*"')


def sqlstate(error: BaseException) -> str | None:
    """The SQLSTATE, whether the error came through SQLAlchemy or straight from asyncpg."""
    code = getattr(_driver_error(error), "sqlstate", None)
    return code if isinstance(code, str) else None


def classify(error: BaseException) -> Fault:
    """What the error says about trying again the transaction that raised it.

    asyncpg may say of a connection that was ended in the midst of a statement that another
    operation is in progress there: that deserves a replay, which in a job that does use its session
    twice at a time is in vain. A bare TimeoutError or FileNotFoundError is OTHER, since it may well
    be the work's own; one met while connecting reaches this function with an SQLSTATE, given to it
    by the engine.
    """
    code = sqlstate(error)
    if code is not None:
        return _FAULT_BY_SQLSTATE.get(code) or _FAULT_BY_CLASS.get(code[:2], Fault.OTHER)
    if isinstance(error, Race) or _is_out_of_step(error):
        return Fault.CONTENTION
    if isinstance(_driver_error(error), asyncpg.OutdatedSchemaCacheError):
        return Fault.STALE_PLAN
    return Fault.OUTAGE if _is_lost_connection(error) else Fault.OTHER


def is_outage(error: BaseException) -> bool:
    """Whether PostgreSQL was away, also while it committed: receipted work is then done again."""
    return isinstance(error, CommitUnknown) or classify(error) is Fault.OUTAGE


def leaves_commit_open(error: BaseException) -> bool:
    """Whether this error, raised by COMMIT, leaves open if the server has committed.

    False when the server answered no, and when COMMIT was never sent: asyncpg raises
    InterfaceError, and SQLAlchemy any error but DBAPIError, before a byte leaves.
    """
    code = sqlstate(error)
    if code is not None:
        return code[:2] == "08" or code[:3] == "57P" or code == "40003"
    driver_error = _driver_error(error)
    return not isinstance(driver_error, asyncpg.InterfaceError | SQLAlchemyError)


def describe(error: BaseException) -> str:
    """One line for people, with the class and the message but no value of any row.

    DETAIL, HINT, CONTEXT, the statement and its parameters are left out, and so is the input
    that PostgreSQL or asyncpg quotes when it cannot read it.
    """
    driver_error = _driver_error(error)
    name = type(driver_error).__name__
    message = " ".join(str(driver_error.args[0]).split()) if driver_error.args else ""
    if isinstance(driver_error, asyncpg.DataError):
        message = _QUOTED.sub('"..."', message)
    elif isinstance(driver_error, asyncpg.InterfaceError):
        message = message.partition(": ")[0] if isinstance(driver_error, ValueError) else message
    return f"{name}: {message}" if message else name


@dataclass(frozen=True)
class Budget:
    """How often one transaction may run for one kind of fault, and how long it waits between."""

    first_wait_s: float
    tries: int
    max_wait_s: float

    def wait_s(self, failed_tries: int) -> float:
        """A random wait below a bound that doubles with every failure."""
        return _full_jitter_s(self.first_wait_s, self.max_wait_s, failed_tries)


BUDGETS: Mapping[Fault, Budget] = MappingProxyType(
    {
        Fault.CONTENTION: Budget(first_wait_s=0.010, tries=20, max_wait_s=1.0),
        Fault.OUTAGE: Budget(first_wait_s=0.5, tries=5, max_wait_s=10.0),
        Fault.STALE_PLAN: Budget(first_wait_s=0.0, tries=2, max_wait_s=0.0),
    }
)
"""The faults that deserve another try; the others have no budget."""

JOB_FIRST_WAIT_S = 2.0
JOB_MAX_WAIT_S = 600.0


def job_backoff_s(failed_attempts: int) -> float:
    """How long a job stays queued before its next attempt."""
    return _full_jitter_s(JOB_FIRST_WAIT_S, JOB_MAX_WAIT_S, failed_attempts)


def _full_jitter_s(first_wait_s: float, max_wait_s: float, failures: int) -> float:
    state = RetryCallState(AsyncRetrying(), fn=None, args=(), kwargs={})
    state.attempt_number = failures
    return wait_random_exponential(multiplier=first_wait_s, max=max_wait_s)(state)


def _driver_error(error: BaseException) -> BaseException:
    """What asyncpg raised, out of the two wrappers that SQLAlchemy puts around it."""
    if isinstance(error, StatementError) and error.orig is not None:
        error = error.orig
    if isinstance(error, EmulatedDBAPIException) and error.__cause__ is not None:
        error = error.__cause__  # its attribute `orig` is empty on a stale plan
    return error


def _is_out_of_step(error: BaseException) -> bool:
    driver_error = _driver_error(error)
    return isinstance(driver_error, asyncpg.InterfaceError) and (
        "another operation is in progress" in str(driver_error)
    )


def _is_lost_connection(error: BaseException) -> bool:
    """Connections that are gone, or were not to be had, without PostgreSQL having said so."""
    if isinstance(error, PoolTimeout | ConnectionError | socket.gaierror):
        return True
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    driver_error = _driver_error(error)
    if isinstance(driver_error, asyncpg.InternalClientError):  # ended in the midst of an answer
        return "cannot switch to state" in str(driver_error)
    return isinstance(driver_error, asyncpg.InterfaceError) and "connection is closed" in str(
        driver_error
    )
