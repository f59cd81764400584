"""Pages of a model's rows in the order of the key, each beginning where the last one ended."""

from dataclasses import dataclass

import sqlalchemy as sa
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession

from db.reading.keys import Key, from_cursor, key_attributes, key_of, to_cursor
from db.reading.public import as_public, select_rows
from db.registry import Model


@dataclass(frozen=True)
class Page:
    """Some rows, and the cursor of those behind them; None when these are the last."""

    rows: tuple[BaseModel, ...]
    next: str | None


async def page(
    session: AsyncSession,
    model: Model,
    *,
    after: str | None = None,
    limit: int = 20,
    deleted: bool = False,
) -> Page:
    """The first rows behind the cursor `after`, in one statement whose cost no page number changes.

    A row that is there all the time comes exactly once, whatever is inserted or deleted between
    two pages. With `deleted` the deleted ones come as well, and tell when they were deleted.
    Raises BadKey for a cursor of something else.
    """
    query = select_rows(model, deleted=deleted).order_by(*key_attributes(model)).limit(limit + 1)
    if after is not None:
        query = query.where(_behind(model, from_cursor(model, after)))
    found = (await session.scalars(query)).all()
    shown = found[:limit]
    rows = tuple(as_public(model, one, deleted=deleted) for one in shown)
    more = len(found) > limit
    return Page(rows, to_cursor(model, key_of(shown[-1])) if more else None)


def _behind(model: Model, key: Key) -> sa.ColumnElement[bool]:
    attributes = key_attributes(model)
    given = [sa.literal(value, one.type) for value, one in zip(key, attributes, strict=True)]
    return sa.tuple_(*attributes) > sa.tuple_(*given)
