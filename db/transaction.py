"""The one place that commits: a transaction that is replayed as a whole when it is worth it."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.errors import AlreadyCommitted, CommitUnknown, NestedTransaction
from db.one_commit import lent
from db.retry import (
    BUDGETS,
    DATABASE_ERRORS,
    Fault,
    classify,
    describe,
    leaves_commit_open,
    sqlstate,
)

LOOK_TIMEOUT_S = 20.0
ANSWER_TIMEOUT_S = 35.0
"""A little longer than PostgreSQL itself may take for what is brief."""
T = TypeVar("T")
IsolationLevel = Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
Work = Callable[[AsyncSession], Awaitable[T]]

log = structlog.get_logger(__name__)


@dataclass
class _Open:
    name: str
    still: bool = True


_open: ContextVar[_Open | None] = ContextVar("open_transaction", default=None)


async def transaction(
    sessions: async_sessionmaker[AsyncSession],
    work: Work[T],
    *,
    name: str,
    receipted: bool = False,
    isolation_level: IsolationLevel | None = None,
    try_within_s: float | None = None,
) -> T:
    """Run the work in a transaction of its own, commit it, and return what it returned.

    On contention, an outage or a stale plan everything is rolled back and the work is called
    again with a new session, so it may touch nothing but its session. Every other error is
    raised at once; so is the last one when the budget of its kind of fault is used up.

    When the answer to COMMIT is lost the work may have been applied. `receipted` work is then
    called again: it inserts its receipt before anything else, and raises AlreadyCommitted with
    its result when the receipt is there. For other work CommitUnknown is raised.

    A try that takes longer than `try_within_s`, which only receipted work may have, is given up as
    on a lost connection. Raises NestedTransaction inside another transaction, also from a task
    started there.
    """
    with _outermost(name):
        replays, cancels = _Replays(name, receipted), _cancels()
        while True:
            try:
                async with _answered_within(try_within_s if receipted else None):
                    return await _try_once(sessions, work, isolation_level)
            except AlreadyCommitted as earlier:
                result: T = earlier.result
                return result
            except DATABASE_ERRORS as error:
                if _cancels() > cancels:
                    raise asyncio.CancelledError from error
                wait_s = replays.wait_s(error)
                if wait_s is None:
                    raise
            await asyncio.sleep(wait_s)  # backoff, so that those who met do not meet again


async def brief(sessions: async_sessionmaker[AsyncSession], work: Work[T], *, name: str) -> T:
    """Run receipted work of a few quick statements; see `transaction`."""
    return await transaction(
        sessions, work, name=name, receipted=True, try_within_s=ANSWER_TIMEOUT_S
    )


async def look(sessions: async_sessionmaker[AsyncSession], work: Work[T]) -> T:
    """Run work whose statements are committed each by itself; an error is raised at once.

    For what is asked again and again, mostly in vain: it saves the round trips of a transaction.
    An answer that does not come within LOOK_TIMEOUT_S is an error as of a lost connection.
    """
    async with _answered_within(LOOK_TIMEOUT_S), sessions() as session:
        await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        return await work(session)


@asynccontextmanager
async def _answered_within(most_s: float | None) -> AsyncIterator[None]:
    """Give up what takes longer: the other end of a connection may be gone without a word."""
    limit = asyncio.timeout(most_s)
    try:
        async with limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise ConnectionError(f"PostgreSQL gives no answer within {most_s} s") from error


def _cancels() -> int:
    """How often this task was cancelled.

    On a connection that is lost, the error of the rollback takes the place of the cancellation.
    """
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


@contextmanager
def _outermost(name: str) -> Iterator[None]:
    """Refuse to begin inside another transaction.

    A task started in there inherits the mark; once that transaction is over the mark says so.
    """
    outer = _open.get()
    if outer is not None and outer.still:
        raise NestedTransaction(
            f'transaction "{name}" was opened inside "{outer.name}"; pass the open session on'
        )
    mark = _Open(name)
    token = _open.set(mark)
    try:
        yield
    finally:
        mark.still = False
        _open.reset(token)


async def _try_once(
    sessions: async_sessionmaker[AsyncSession],
    work: Work[T],
    isolation_level: IsolationLevel | None,
) -> T:
    session = sessions()
    try:
        if isolation_level is not None:
            await session.connection(execution_options={"isolation_level": isolation_level})
        with lent(session):
            result = await work(session)
        await _commit(session)
        return result
    except DATABASE_ERRORS as error:
        if classify(error) is Fault.OUTAGE:
            await session.invalidate()
        raise
    finally:
        await _close(session)


async def _commit(session: AsyncSession) -> None:
    """Commit, and tell an answer that was lost from one that said no.

    Deferred constraints are checked first, which leaves COMMIT little to refuse. The same
    statement fails in a transaction that PostgreSQL has already given up: if the work swallowed
    the error, COMMIT would roll back without a word.
    """
    await session.flush()
    if session.in_transaction():
        await session.execute(text("SET CONSTRAINTS ALL IMMEDIATE"))
    try:
        await session.commit()
    except DATABASE_ERRORS as error:
        if leaves_commit_open(error):
            raise CommitUnknown from error
        raise


async def _close(session: AsyncSession) -> None:
    """Roll back what was not committed and give the connection back.

    Fails only on a connection that is lost, where PostgreSQL rolls back by itself and SQLAlchemy
    throws the connection away; that must not take the place of the work's result or error.
    """
    with suppress(*DATABASE_ERRORS):
        await session.close()


@dataclass
class _Replays:
    """How often each kind of fault has struck one transaction; each has a budget of its own."""

    name: str
    receipted: bool
    failed_tries: Counter[Fault] = field(default_factory=Counter)

    def wait_s(self, error: Exception) -> float | None:
        """How long to wait before the next try, or None when there is to be none."""
        fault = self._fault(error)
        budget = BUDGETS.get(fault)
        if budget is None:
            return None
        self.failed_tries[fault] += 1
        told = log.bind(
            name=self.name,
            fault=fault.value,
            sqlstate=_sqlstate(error),
            reason=describe(error),
            try_no=self.failed_tries.total(),
        )
        if self.failed_tries[fault] >= budget.tries:
            told.error("transaction.gave_up")
            return None
        wait_s = budget.wait_s(self.failed_tries[fault])
        told.warning("transaction.replayed", wait_s=round(wait_s, 4))
        return wait_s

    def _fault(self, error: Exception) -> Fault:
        if self.receipted and isinstance(error, CommitUnknown):
            return Fault.OUTAGE
        return classify(error)


def _sqlstate(error: Exception) -> str | None:
    cause = error.__cause__ if isinstance(error, CommitUnknown) else None
    return sqlstate(cause or error)
