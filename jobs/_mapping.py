"""Which column of an input goes into which field of a model, and which rows are meant at all.

club=team.name             column `club` names a team; its id goes into the foreign key
club=team_id.name          the same, where several foreign keys lead to that table
full_name=name             column `full_name` is the field `name`
key='{name}|{position}'    the field `key` is made from columns
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs._part import ABSENT, Values
from jobs._references import Reference
from jobs._template import as_text

OWN_PREFIX = "bulwark_"
"""Columns that an export of rejects adds begin so; an import passes them over."""


@dataclass(frozen=True)
class Request:
    """What the payload says about columns."""

    map: Mapping[str, str]
    constants: Mapping[str, Any]
    where: Mapping[str, str]
    ignore: Sequence[str]
    ignore_unknown: bool
    expect_version: str | None = None


@dataclass(frozen=True)
class Plan:
    """How one input's rows become the fields of a model.

    `sources` tells for each field from which column a person would mend it, `version` is the column
    of the version that a row counts on.
    """

    direct: tuple[tuple[str, int], ...]
    made: tuple[tuple[str, Callable[[Values], str | None]], ...]
    constants: Mapping[str, Any]
    references: tuple[Reference, ...]
    filters: tuple[tuple[int, str], ...]
    sources: Mapping[str, str]
    version: int | None = None

    def selects(self, values: Values) -> bool:
        """Whether the row is part of the input at all."""
        return all(as_text(values[index]) == wanted for index, wanted in self.filters)

    @property
    def given(self) -> tuple[str, ...]:
        """The fields that every row gives, if it has all columns of the input."""
        names = (name for name, _ in (*self.direct, *self.made, *self.constants.items()))
        return (*names, *(reference.field for reference in self.references))

    def columnwise(self, rows: Sequence[Values]) -> list[Sequence[Any]]:
        """The values of the given fields but those of references: one sequence for each field."""
        columns = list(zip(*rows, strict=True))
        direct = [columns[index] for _, index in self.direct]
        made = [[make(values) for values in rows] for _, make in self.made]
        return [*direct, *made, *([value] * len(rows) for value in self.constants.values())]

    def fields(self, values: Values) -> dict[str, Any]:
        """The row's fields, without those that references will give."""
        row = {name: value for name, i in self.direct if (value := values[i]) is not ABSENT}
        for name, make in self.made:
            row[name] = make(values)
        if self.constants:
            row.update(self.constants)
        return row
