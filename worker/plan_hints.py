"""What a person who reads a plan may want to know, or to add to its command."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from db.catalog import TableFacts
from db.registry import Model
from jobs import _guess as guess
from jobs._column_kinds import Column
from jobs._guess import Fit
from jobs._references import Reference
from jobs._relations import Relation
from worker.import_command import Import
from worker.import_sample import Sample, shape_words
from worker.import_words import shell_line, shell_word
from worker.plan_trial import Trial, is_creatable

FEW_VALUES = range(2, 6)
"""A column with so many different values may be one to select rows by."""
ROWS_A_VALUE = 10
"""That many rows for each of its values make it likely."""


@dataclass(frozen=True)
class Hints:
    """The hints about one plan; `file` is the input as the command names it."""

    asked: Import
    file: str
    sample: Sample
    columns: Sequence[Column]
    fit: Fit
    relations: Sequence[Relation]
    trial: Trial

    def all(self) -> Iterator[str]:
        for reference, count in self.trial.missing.items():
            named = f"rows name {count:,} {reference.table} rows that are not there"
            yield f"{named}: {self._how(reference)}"
        yield from self._empty_references()
        yield from self._keys()
        yield from self._selections()

    def _how(self, reference: Reference) -> str:
        """How the rows that are named and missing come to be there."""
        if self.asked.options.get("on_missing") == "create":
            return "they are created"
        if not is_creatable(self.trial.parents, reference):
            return "import them first"
        words = shell_line(self._import_first(reference))
        return f"add --on-missing create, or import them first, as with {words}"

    def _import_first(self, reference: Reference) -> list[str]:
        """The command that makes rows of the same input's natural keys."""
        fields = self.trial.parents.parents[reference].model.create.model_fields
        words = ["bulwark", "import", reference.table, self.file]
        words += shape_words(self.sample.shape)
        words += ["--map", f"{reference.column}={reference.key}"]
        for name, value in self.asked.columns.where.items():
            words += ["--where", f"{name}={value}"]
        for name in self.sample.columns:
            words += ["--ignore", name] if name in fields and name != reference.column else []
        return [*words, "--ignore-unknown", "--on-conflict", "skip"]

    def _empty_references(self) -> Iterator[str]:
        model = self.fit.model.name
        for relation in self.relations:
            if relation.field not in self.trial.plan.given and relation.names:
                target = relation.target(relation.names[0])
                yield (
                    f"{model}.{relation.field} is left empty: if a column names the "
                    f"{relation.table}, add --map COLUMN={target}"
                )

    def _keys(self) -> Iterator[str]:
        keys = _unique_keys(self.fit.model, self.trial.parents.child)
        if keys and not any(set(key) <= set(self.trial.plan.given) for key in keys):
            named = guess.listed([" with ".join(key) for key in keys], "or")
            yield (
                f"nothing gives {named}, by which rows of {self.fit.model.name} are told apart, so "
                f"that the same rows can go in twice{self._made_key(keys)}"
            )

    def _made_key(self, keys: Sequence[tuple[str, ...]]) -> str:
        """How a key could be made of columns, if one may be any text."""
        fit = self.fit
        texts = [one for one in self.columns if one.kind == "text" and not one.empty]
        own = {name for name, target in fit.taken.items() if name == target.text}
        texts.sort(key=lambda one: one.name not in own)
        free = [key[0] for key in keys if len(key) == 1 and guess.takes(fit.model, key[0], "a|b")]
        if not free or len(texts) < 2:
            return ""
        template = "|".join(f"{{{one.name}}}" for one in texts[:2])
        return f"; a key can be made of columns, as in --map {free[0]}='{template}'"

    def _selections(self) -> Iterator[str]:
        few = [] if self.asked.columns.where else list(filter(self._may_select, self.columns))
        if few:
            values = ", ".join(
                f"{one.name} ({guess.listed(sorted(one.values), 'or')})" for one in few[:3]
            )
            first = shell_word(f"{few[0].name}={min(few[0].values)}")
            yield f"few values: {values}; a part of the rows is selected by --where {first}"

    def _may_select(self, column: Column) -> bool:
        rows = len(self.sample.part.rows)
        return (
            len(column.values) in FEW_VALUES
            and rows >= ROWS_A_VALUE * len(column.values)
            and all(isinstance(value, str) for value in column.values)
            and not column.empty
            and column.name not in {*self.fit.taken, *self.fit.misfits}
        )


def _unique_keys(model: Model, facts: TableFacts) -> list[tuple[str, ...]]:
    """The unique keys that an input can give."""
    keys = [tuple(key.strip('"') for key in one.keys) for one in facts.unique_indexes]
    return [key for key in keys if set(key) <= set(model.create.model_fields)]
