"""Which errors deserve another try, how long the waits are, and what people get to read."""

import asyncio
import socket

import asyncpg
import pytest
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi
from sqlalchemy.exc import (
    DBAPIError,
    NoResultFound,
    PendingRollbackError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout

from db.errors import AlreadyCommitted, ClaimLost, CommitUnknown, Race
from db.retry import (
    BUDGETS,
    Budget,
    Fault,
    classify,
    describe,
    job_backoff_s,
    leaves_commit_open,
    sqlstate,
)


def from_server(code: str, message: str = "no", **fields: str) -> asyncpg.PostgresError:
    """The error that asyncpg raises on a server's answer with this SQLSTATE."""
    long_names = {"detail": "D", "hint": "H", "context": "W", "function": "R"}
    answer = {"C": code, "M": message} | {long_names[name]: text for name, text in fields.items()}
    return asyncpg.PostgresError.new(answer)


def through_sqlalchemy(error: Exception) -> Exception:
    """The same error as a statement run by SQLAlchemy raises it."""
    dbapi = AsyncAdapt_asyncpg_dbapi(asyncpg)  # type: ignore[no-untyped-call]  # no types there in SQLAlchemy
    emulated = next(
        dbapi._asyncpg_error_translate[base]
        for base in type(error).__mro__
        if base in dbapi._asyncpg_error_translate
    )
    wrapped = emulated(error.args[0], error)
    wrapped.__cause__ = error
    statement, parameters = "INSERT INTO hero VALUES ($1)", ("Elvira",)
    made = DBAPIError.instance(
        statement, parameters, wrapped, AsyncAdapt_asyncpg_dbapi.Error, hide_parameters=False
    )
    assert isinstance(made, DBAPIError)
    return made


CONTENTION = ["40001", "40P01", "55P03"]
OUTAGE = [
    *("08000", "08001", "08003", "08006", "08P01"),
    *("57P01", "57P02", "57P03", "57P04", "57P05"),
    *("53000", "53100", "53200", "53300", "53400"),
    *("25006", "25P03", "25P04"),
]
INTEGRITY = ["23000", "23502", "23503", "23505", "23514", "23P01"]
OTHER = ["57014", "42P01", "22P02", "25P02", "28P01", "40003", "55006", "XX000", "P0001"]


EXPECTED = [
    *((code, Fault.CONTENTION) for code in CONTENTION),
    *((code, Fault.OUTAGE) for code in OUTAGE),
    *((code, Fault.INTEGRITY) for code in INTEGRITY),
    *((code, Fault.OTHER) for code in OTHER),
    ("0A000", Fault.STALE_PLAN),
]


@pytest.mark.parametrize(("code", "fault"), EXPECTED)
def test_an_error_means_the_same_raw_and_through_sqlalchemy(code: str, fault: Fault) -> None:
    raw = from_server(code)

    assert (sqlstate(raw), classify(raw)) == (code, fault)
    wrapped = through_sqlalchemy(raw)
    assert (sqlstate(wrapped), classify(wrapped)) == (code, fault)


def test_a_stale_cached_plan_keeps_its_sqlstate_through_sqlalchemy() -> None:
    stale = from_server("0A000", function="RevalidateCachedQuery")
    assert isinstance(stale, asyncpg.InvalidCachedStatementError)

    assert sqlstate(through_sqlalchemy(stale)) == "0A000"
    assert classify(through_sqlalchemy(stale)) is Fault.STALE_PLAN


@pytest.mark.parametrize(
    "error",
    [
        PoolTimeout("QueuePool limit of size 5 overflow 5 reached"),
        ConnectionRefusedError(111, "Connection refused"),
        ConnectionResetError("Connection lost"),
        socket.gaierror(-2, "Name or service not known"),
        asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
        asyncpg.InterfaceError("cannot perform operation: connection is closed"),
        through_sqlalchemy(
            asyncpg.InterfaceError("cannot perform operation: connection is closed")
        ),
        DBAPIError(None, None, RuntimeError("gone"), connection_invalidated=True),
    ],
    ids=lambda error: f"{type(error).__name__}",
)
def test_a_connection_that_is_lost_or_not_to_be_had_is_an_outage(error: Exception) -> None:
    assert classify(error) is Fault.OUTAGE


def test_a_connection_that_was_ended_in_the_midst_of_a_statement_means_a_replay() -> None:
    words = "cannot perform operation: another operation is in progress"
    assert classify(asyncpg.InterfaceError(words)) is Fault.CONTENTION


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        asyncio.CancelledError(),
        FileNotFoundError(2, "No such file", "heroes.csv"),
        PendingRollbackError("Can't reconnect until invalid transaction is rolled back."),
        NoResultFound("No row was found when one was required"),
        ClaimLost(),
        CommitUnknown(),
        AlreadyCommitted(),
        ValueError("connection is closed"),
    ],
    ids=lambda error: f"{type(error).__name__}",
)
def test_what_the_work_itself_may_raise_is_not_tried_again(error: BaseException) -> None:
    assert classify(error) is Fault.OTHER


def test_a_race_is_contention_and_an_outdated_type_is_a_stale_plan() -> None:
    assert classify(Race()) is Fault.CONTENTION
    assert classify(asyncpg.OutdatedSchemaCacheError("changed")) is Fault.STALE_PLAN


def test_only_faults_worth_another_try_have_a_budget() -> None:
    assert {fault: (b.first_wait_s, b.tries) for fault, b in BUDGETS.items()} == {
        Fault.CONTENTION: (0.010, 20),
        Fault.OUTAGE: (0.5, 5),
        Fault.STALE_PLAN: (0.0, 2),
    }


@pytest.mark.parametrize(
    ("failed_tries", "bound_s"),
    [(1, 0.010), (2, 0.020), (3, 0.040), (7, 0.640), (8, 1.0), (19, 1.0)],
)
def test_the_wait_is_spread_over_a_bound_that_doubles_up_to_a_cap(
    failed_tries: int, bound_s: float
) -> None:
    budget = Budget(first_wait_s=0.010, tries=20, max_wait_s=1.0)

    waits_s = [budget.wait_s(failed_tries) for _ in range(500)]

    assert 0 <= min(waits_s) < 0.1 * bound_s
    assert 0.9 * bound_s < max(waits_s) <= bound_s


@pytest.mark.parametrize(("failed_attempts", "bound_s"), [(1, 2), (2, 4), (9, 512), (10, 600)])
def test_a_job_waits_from_two_seconds_up_to_ten_minutes(
    failed_attempts: int, bound_s: float
) -> None:
    waits_s = [job_backoff_s(failed_attempts) for _ in range(500)]

    assert 0 <= min(waits_s) < 0.1 * bound_s
    assert 0.9 * bound_s < max(waits_s) <= bound_s


def test_a_job_that_failed_very_often_still_has_a_finite_wait() -> None:
    assert 0 <= job_backoff_s(1_000_000) <= 600


@pytest.mark.parametrize(
    ("error", "is_open"),
    [
        (from_server("08006"), True),
        (from_server("57P01"), True),
        (from_server("40003"), True),
        (asyncpg.ConnectionDoesNotExistError("connection was closed in the middle"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (from_server("40001"), False),
        (from_server("23505"), False),
        (from_server("53100"), False),
        (asyncpg.InterfaceError("cannot perform operation: connection is closed"), False),
        (PendingRollbackError("Can't reconnect"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_commit_stays_open_unless_the_server_refused_or_was_never_asked(
    error: Exception, is_open: bool
) -> None:
    assert leaves_commit_open(error) is is_open
    if isinstance(error, asyncpg.PostgresError | asyncpg.InterfaceError):
        assert leaves_commit_open(through_sqlalchemy(error)) is is_open


def test_a_description_has_no_value_of_the_row_that_failed() -> None:
    error = from_server(
        "23505",
        'duplicate key value violates unique constraint "uq_hero_email"',
        detail="Key (email)=(elvira@example.org) already exists.",
        hint="elvira",
        context="COPY hero, line 3: elvira@example.org",
    )

    expected = (
        'UniqueViolationError: duplicate key value violates unique constraint "uq_hero_email"'
    )
    assert describe(error) == expected
    assert describe(through_sqlalchemy(error)) == expected


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            from_server("22P02", 'invalid input syntax for type integer: "el"vi\nra"'),
            'InvalidTextRepresentationError: invalid input syntax for type integer: "..."',
        ),
        (
            asyncpg.exceptions._base.DataError("invalid input for query argument $1: 'el: vira'"),
            "DataError: invalid input for query argument $1",
        ),
    ],
)
def test_a_description_leaves_out_input_that_could_not_be_read(error: Exception, text: str) -> None:
    assert describe(error) == text
    assert describe(through_sqlalchemy(error)) == text


def test_a_description_is_one_line() -> None:
    assert describe(ValueError("line 1\n  line 2")) == "ValueError: line 1 line 2"
    assert describe(TimeoutError()) == "TimeoutError"
    assert describe(Race()) == f"Race: {Race.__doc__}"


def test_a_connection_that_was_ended_in_the_midst_of_an_answer_is_an_outage() -> None:
    """asyncpg says so, and SQLAlchemy does not stand between where rows are copied."""
    text = "cannot switch to state 11; another operation (2) is in progress"
    assert classify(asyncpg.InternalClientError(text)) is Fault.OUTAGE
    assert classify(asyncpg.InternalClientError("no such codec")) is Fault.OTHER
