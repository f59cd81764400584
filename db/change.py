"""What is asked of rows that are there, named by a key, and what became of them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import sqlalchemy as sa

from db.dependents import NO_DEPENDENTS, Dependents
from db.ledger.audit import Journal
from db.ledger.verdict import Verdict
from db.outcome import Written
from db.overwriting import DELETE, OVERWRITE, RESTORE, Effect
from db.refusal import Refusal

_VERDICTS = {
    OVERWRITE: Verdict.UPDATED,
    DELETE: Verdict.DELETED,
    RESTORE: Verdict.RESTORED,
}


@dataclass(frozen=True)
class Change:
    """What is to happen to rows of a table, and by which columns they are named.

    Rows that do not fulfil the condition `only` are left as they are.
    """

    effect: Effect
    key: tuple[str, ...]
    journal: Journal
    table: sa.Table
    sensitive: frozenset[str] = frozenset()
    dependents: Dependents = NO_DEPENDENTS
    only: sa.ColumnElement[bool] | None = None


@dataclass(frozen=True)
class Changed(Written):
    """Rows that were there: changed by the effect, or left as they are.

    `along` are the rows of other tables that were changed with them.
    """

    effect: Effect
    rows: frozenset[int] = frozenset()
    unchanged: frozenset[int] = frozenset()
    refused: dict[int, Refusal] = field(default_factory=dict)
    along: Mapping[str, int] = field(default_factory=dict)

    @property
    def changed(self) -> Mapping[str, int]:
        return {self.effect.action: len(self.rows)} if self.rows else {}

    @property
    def changed_along(self) -> Mapping[str, Mapping[str, int]]:
        return {table: {self.effect.action: rows} for table, rows in self.along.items() if rows}

    def taken(self) -> Mapping[Verdict, Collection[int]]:
        return {_VERDICTS[self.effect]: self.rows, Verdict.UNCHANGED: self.unchanged}
