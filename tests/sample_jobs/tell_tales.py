"""A job that fails in the ways in which errors carry the values of rows along."""

from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from db.models.hero import Hero, HeroCreate
from jobs._declaration import Outcome, Payload, job

_CAST = sa.text("SELECT CAST(CAST(:secret AS text) AS integer)")


class TellTales(Payload):
    """`secret` is a secret name; one is there already."""

    secret: str
    how: Literal["integrity", "wrapped", "context", "validation", "cast", "group"]


@job(timeout_s=60, max_attempts=1)
async def tell_tales(session: AsyncSession, payload: TellTales) -> Outcome:
    """Fail as told."""
    match payload.how:
        case "validation":
            HeroCreate(name="Ann", secret_name=payload.secret * 50)
        case "integrity":
            await _clash(session, payload.secret)
        case "cast":
            await session.execute(_CAST, {"secret": payload.secret})
        case _:
            await _clash_and_wrap(session, payload)
    return None


async def _clash(session: AsyncSession, secret: str) -> None:
    session.add_all([Hero(name="Ann", secret_name=secret), Hero(name="Bob", secret_name=secret)])
    await session.flush()


async def _clash_and_wrap(session: AsyncSession, payload: TellTales) -> Any:
    try:
        await _clash(session, payload.secret)
    except IntegrityError as error:
        if payload.how == "wrapped":
            raise RuntimeError("two heroes of one secret name") from error
        if payload.how == "group":
            raise ExceptionGroup("several", [error, ValueError("and more")]) from None
        raise KeyError("two heroes of one secret name")  # noqa: B904 - the context is what is tried
