"""Writing the rows of a chunk over those that they name: overwritten, deleted or restored."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from db.change import Change, Changed
from db.changing import change_rows
from db.columns import changed_by
from db.dependents import NO_DEPENDENTS, Dependents
from db.merging import Given
from db.overwriting import OVERWRITE, Effect
from db.registry import Model
from db.unique_values import touched_by
from jobs._errors import InputError
from jobs._filter import Filter
from jobs._mapping import Plan
from jobs._prepared import Prepared
from jobs._turn import Turn
from jobs._writer import Ready, Writer


@dataclass
class Changer(Writer):
    """Lets an effect come over the rows that are named by `key`, for a job of a `kind`.

    Those that do not fulfil the filter any more are left alone.
    """

    effect: Effect
    key: tuple[str, ...]
    kind: str
    dependents: Dependents = NO_DEPENDENTS
    filter: Filter | None = None
    in_front: set[Any] | None = None

    def __post_init__(self) -> None:
        changes = self.effect is OVERWRITE
        require_changeable(self.plan, self.key, self.model, self.kind, changes=changes)

    @property
    def _finds_by_primary_key(self) -> bool:
        return self.key == self.facts.primary_key

    def is_apart(self, prepared: Prepared) -> bool:
        """Whether no row is named that the chunk before names; by other keys it cannot be told."""
        in_front, self.in_front = self.in_front, None
        columns = [self.facts.by_key.get(name) for name in self.key]
        if self._finds_by_primary_key and all(one and one.comparable for one in columns):
            places = [self.columns.index(name) for name in self.key]
            self.in_front = set(map(itemgetter(*places), prepared.records))
        return (
            in_front is not None
            and self.in_front is not None
            and in_front.isdisjoint(self.in_front)
        )

    def overlaps(self, ready: Ready) -> bool:
        facts = self.facts
        alone = facts.deferrable or facts.own_parent or facts.has_triggers
        return ready.apart and not alone and not self._touches_unique

    @property
    def _touches_unique(self) -> bool:
        """Whether what a row becomes may depend on what the chunk before made."""
        changed = [name for name in self.plan.given if name not in self.key]
        indexes = self.facts.unique_indexes
        return self.effect is not OVERWRITE or any(touched_by(one, changed) for one in indexes)

    async def write(
        self, session: AsyncSession, ready: Ready, prepared: Prepared, turn: Turn
    ) -> Changed:
        if not self.overlaps(ready):
            await turn.may_look()
        given = Given(frozenset(self.plan.given), prepared.given, prepared.expected)
        still = None if self.filter is None else self.filter.condition
        change = Change(
            self.effect,
            self.key,
            self.journal(ready.part),
            self.model.table,
            self.model.sensitive_columns,
            self.dependents,
            still,
        )
        return await change_rows(
            session, self.facts, self.columns, prepared.batch, given, change, turn.may_look
        )


def require_changeable(
    plan: Plan, key: Sequence[str], model: Model, kind: str, *, changes: bool
) -> None:
    """Raise InputError about columns that a job of this kind may not change, or if there are none.

    An input without columns has no rows either.
    """
    changed = [name for name in plan.given if name not in key]
    for name in changed:
        alone = changed_by(model.table.c[name])
        if alone not in (None, kind):
            raise InputError(
                f"{model.name}.{name} is changed by {alone} alone; leave it out, a column of the "
                f"input with --ignore {name}"
            )
    if changes and plan.given and not changed:
        raise InputError(
            f"nothing but the key of {model.name} is given; name a column to change, or give a "
            "value for all rows with --set"
        )
