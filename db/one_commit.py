"""A transaction is ended by whoever began it, and never by the work that is done in it."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import orm
from sqlalchemy.ext.asyncio import AsyncSession

from db.errors import EndsOutside

_LENT = "bulwark.lent"


class LentSession(orm.Session):
    """A session that refuses to commit or to roll back while it is lent; savepoints are free."""

    def commit(self) -> None:
        self._require_own()
        super().commit()

    def rollback(self) -> None:
        self._require_own()
        super().rollback()

    def _require_own(self) -> None:
        if self.info.get(_LENT):
            raise EndsOutside


@contextmanager
def lent(session: AsyncSession) -> Iterator[None]:
    """Have the session refuse both while the block lasts."""
    session.info[_LENT] = True
    try:
        yield
    finally:
        del session.info[_LENT]
