"""What the jobs that move heroes have in common: their payloads, and how their orders end."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field
from sqlalchemy.ext.asyncio import AsyncSession

from db.columns import INTEGER_MAX, Note, Reference
from db.ledger.verdict import RowVerdict, Verdict
from db.orders import Moved, Order, Refused
from db.transfers import transfer
from jobs._declaration import Outcome, Payload
from jobs._errors import Rejected

MOST_HEROES = 1000

Heroes = Annotated[list[Reference], Field(min_length=1, max_length=MOST_HEROES)]


class MovingHeroes(Payload):
    """What every job that moves heroes may be told.

    `expect_versions` are, by hero, the versions that the caller has seen; on another one the job is
    refused as a conflict. A dry run judges and changes nothing.
    """

    expect_versions: dict[Reference, Annotated[int, Field(ge=1, le=INTEGER_MAX)]] = {}
    reason: Note | None = None
    dry_run: bool = False

    def check_expected(self, hero_ids: Sequence[int]) -> None:
        """Raises ValueError about a version that is expected of somebody else."""
        if strangers := sorted(self.expect_versions.keys() - set(hero_ids)):
            raise ValueError(
                f"a version is expected of hero {strangers[0]}, who is not to be moved"
            )


async def carry_out(session: AsyncSession, orders: Sequence[Order]) -> list[Outcome | Rejected]:
    """How the job of each order ends; one that is refused has changed nothing."""
    results = await transfer(session, orders)
    return [_ending(order, result) for order, result in zip(orders, results, strict=True)]


def only(endings: Sequence[Outcome | Rejected]) -> Outcome:
    """The ending of a job whose order was alone. Raises it if it is a refusal."""
    (ending,) = endings
    if isinstance(ending, Rejected):
        raise ending
    return ending


def _ending(order: Order, result: Moved | Refused) -> Outcome | Rejected:
    if isinstance(result, Refused):
        return _refusal(order, result)
    verdicts = {Verdict.MOVED.value: len(order.moves)}
    if result.transfers is None:
        return {"dry_run": True, "verdicts": verdicts}
    return {
        "verdicts": verdicts,
        "transfers": list(result.transfers),
        "roles_ended": result.roles_ended,
    }


def _refusal(order: Order, refused: Refused) -> Outcome | Rejected:
    """A dry run that finds out that the order would be refused has done what it was asked for."""
    verdict = Verdict.CONFLICT if refused.is_conflict else Verdict.REJECTED
    counts = _counts(verdict, len(order.moves))
    why = refused.refusal
    text = f"{why.code}: {why.message}"
    if order.dry_run:
        return {"dry_run": True, "verdicts": counts, "refused": text}
    row = RowVerdict(
        refused.place + 1,
        order.origin.chunk_no,
        None,
        verdict.value,
        why.code,
        why.column,
        why.message,
        None,
    )
    return Rejected(text, counts=counts, verdicts=[row])


def _counts(verdict: Verdict, heroes: int) -> Mapping[str, int]:
    rest = {Verdict.NOT_REACHED.value: heroes - 1} if heroes > 1 else {}
    return {verdict.value: 1, **rest}
