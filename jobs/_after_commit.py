"""Doing something once a session's transaction has committed, and only then."""

from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import await_only

Action = Callable[[], Awaitable[None]]
_WAITING = "bulwark.after_commit"


def after_commit(session: AsyncSession, action: Action) -> None:
    """Run the action after the outermost commit of the session's present transaction.

    It is dropped when that transaction, or the savepoint in which it was registered, ends in any
    other way. It is awaited before the commit returns; it must not raise, nor use the session.
    """
    inner = session.sync_session
    waiting = inner.info.get(_WAITING)
    if waiting is None:
        waiting = inner.info[_WAITING] = []
        event.listen(inner, "after_commit", _committed)
        event.listen(inner, "after_transaction_end", _ended)
    waiting.append((_present(inner), action))


def _present(session: Session) -> SessionTransaction:
    return session.get_nested_transaction() or session.get_transaction() or session.begin()


def _committed(session: Session) -> None:
    waiting: list[tuple[SessionTransaction, Action]] = session.info[_WAITING]
    nested = session.get_nested_transaction()
    if nested is not None:
        outer = nested.parent
        assert outer is not None
        waiting[:] = [(outer if at is nested else at, do) for at, do in waiting]
        return
    due, waiting[:] = list(waiting), []
    for _, action in due:
        await_only(_awaited(action))


async def _awaited(action: Action) -> None:
    await action()


def _ended(session: Session, transaction: SessionTransaction) -> None:
    """Drop what still waits for it: what it committed waits no more, or for its parent."""
    waiting: list[tuple[SessionTransaction, Action]] = session.info[_WAITING]
    waiting[:] = [(at, do) for at, do in waiting if not _within(at, transaction)]


def _within(transaction: Any, outer: SessionTransaction) -> bool:
    while transaction is not None:
        if transaction is outer:
            return True
        transaction = transaction.parent
    return False
