"""The tables that a model refers to, as far as an input may name their rows by natural key."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from db.catalog import ForeignKey, TableFacts
from db.registry import Model, Registry
from jobs._errors import InputError
from jobs._references import bare_name, natural_key

Known = Mapping[str, TableFacts]
"""The facts of each model's table, by the model's name."""


@dataclass(frozen=True)
class Relation:
    """A table that the model refers to, and the columns by which an input may name its rows."""

    key: ForeignKey
    table: str
    names: tuple[str, ...]
    alone: bool

    @property
    def field(self) -> str:
        """The model's field that holds the reference."""
        return self.key.columns[0]

    def target(self, name: str) -> str:
        """The row's natural key as --map has it."""
        return f"{self.table if self.alone else self.field}.{name}"


def relations_of(model: Model, facts: TableFacts, models: Registry, known: Known) -> list[Relation]:
    """The tables whose rows an input of the model may name; `known` are the facts of all."""
    keys = [
        key
        for key in facts.foreign_keys
        if len(key.columns) == 1
        and key.columns[0] in model.create.model_fields
        and bare_name(key) in known
        and bare_name(key) != model.name
    ]
    tables = Counter(map(bare_name, keys))
    return [
        Relation(key, table, _natural_keys(models.get(table), known[table]), tables[table] == 1)
        for key in keys
        for table in [bare_name(key)]
    ]


def _natural_keys(model: Model, facts: TableFacts) -> tuple[str, ...]:
    def names_a_row(name: str) -> bool:
        try:
            natural_key(model.table, facts, name)
        except InputError:
            return False
        return True

    return tuple(filter(names_a_row, model.table.columns.keys()))
