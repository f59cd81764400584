"""From the raw rows of a chunk to values for COPY: selected, mapped, validated by the model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from db import bulk
from db.bulk import DEFAULT
from db.catalog import TableFacts
from db.columns import is_sensitive
from db.refusal import Refusal
from db.registry import Model
from jobs._mapping import ABSENT, Plan, Reference, Values

Known = Mapping[str, Mapping[str, Any]]
"""For each referencing field: natural key → id of the row it names."""

MAX_MESSAGE_CHARS = 1000
MAX_SHOWN_CHARS = 100
MASK = "***"


@dataclass(frozen=True)
class Row:
    """One row of the input as it was read; `fault` when it could not be split into values."""

    line: int | None
    values: Values
    raw: bytes
    fault: Refusal | None = None


@dataclass
class Prepared:
    """A chunk's rows, ready to be inserted: `records[i]` is made of row `positions[i]`."""

    rows: Sequence[Row]
    positions: list[int] = field(default_factory=list)
    records: list[tuple[Any, ...]] = field(default_factory=list)
    refused: dict[int, Refusal] = field(default_factory=dict)
    filtered: int = 0

    def until(self, end: int) -> "Prepared":
        """The part of it that stands before row `end`."""
        ready = [pair for pair in zip(self.positions, self.records, strict=True) if pair[0] < end]
        return Prepared(
            self.rows,
            [position for position, _ in ready],
            [record for _, record in ready],
            {position: why for position, why in self.refused.items() if position < end},
        )


class Preparer:
    """Turns rows into records for one model under one plan."""

    def __init__(self, model: Model, plan: Plan, facts: TableFacts) -> None:
        self._model = model
        self._plan = plan
        self.columns = tuple(model.create.model_fields)
        self._optional = facts.defaulted & set(self.columns)
        self._validate = model.create.__pydantic_validator__.validate_python
        self._pick = _picker(self.columns)
        self._convert = bulk.bind_processors(model.table, self.columns)

    def wanted_keys(self, rows: Iterable[Row]) -> dict[Reference, set[str]]:
        """The natural keys that the rows mention, to be looked up before they are prepared."""
        wanted: dict[Reference, set[str]] = {one: set() for one in self._plan.references}
        for row in rows:
            if row.fault is None and self._plan.selects(row.values):
                for reference, keys in wanted.items():
                    value = row.values[reference.index]
                    if isinstance(value, str) and "\0" not in value:
                        keys.add(value)
        return wanted

    def count_filtered(self, rows: Iterable[Row]) -> int:
        """How many rows are not part of the input."""
        return sum(row.fault is None and not self._plan.selects(row.values) for row in rows)

    def prepare(self, rows: Sequence[Row], known: Known) -> Prepared:
        """Validate every selected row; what is wrong with one is its refusal, and no error."""
        prepared = Prepared(rows)
        for position, row in enumerate(rows):
            if row.fault is not None:
                prepared.refused[position] = row.fault
            elif not self._plan.selects(row.values):
                prepared.filtered += 1
            else:
                self._prepare_one(prepared, position, row, known)
        return prepared

    def _prepare_one(self, prepared: Prepared, position: int, row: Row, known: Known) -> None:
        fields = self._plan.fields(row.values)
        for reference in self._plan.references:
            value = row.values[reference.index]
            if value is ABSENT:
                continue
            identity = known[reference.field].get(value) if isinstance(value, str) else None
            if identity is None and value is not None:
                prepared.refused[position] = self._unknown_key(reference, value)
                return
            fields[reference.field] = identity
        try:
            valid = self._validate(fields)
        except ValidationError as error:
            prepared.refused[position] = self._invalid(error, fields)
            return
        record = self._record(valid)
        if isinstance(record, Refusal):
            prepared.refused[position] = record
            return
        prepared.positions.append(position)
        prepared.records.append(record)

    def _record(self, valid: BaseModel) -> tuple[Any, ...] | Refusal:
        """The values for COPY: None is NULL whatever the type, what nobody set is DEFAULT."""
        record = self._pick(valid)
        if unset := self._optional - valid.model_fields_set:
            record = tuple(
                DEFAULT if value is None and name in unset else value
                for name, value in zip(self.columns, record, strict=True)
            )
        if not any(self._convert):
            return record
        values = []
        for name, value, convert in zip(self.columns, record, self._convert, strict=True):
            try:
                if convert is not None and value is not None and value is not DEFAULT:
                    value = convert(value)  # noqa: PLW2901 - the bare value is not needed again
                values.append(value)
            except (ValueError, TypeError, LookupError) as error:
                column = self._plan.sources.get(name, name)
                text = f"{column}: cannot be stored ({type(error).__name__}); correct the value"
                return Refusal("invalid", text, column)
        return tuple(values)

    def _invalid(self, error: ValidationError, fields: Mapping[str, Any]) -> Refusal:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        columns = [self._column_of(problem) for problem in problems]
        text = "; ".join(
            f"{column or 'row'}: {self._message(problem)}"
            for column, problem in zip(columns, problems, strict=True)
        )
        return Refusal("invalid", self._shown(text, fields), columns[0])

    def _shown(self, text: str, fields: Mapping[str, Any]) -> str:
        """A validator's words without the sensitive values that they may quote."""
        for name in self._model.sensitive_columns & fields.keys():
            if secret := fields[name]:
                text = text.replace(str(secret), MASK)
        return _short(text.replace("\0", "\\0"), MAX_MESSAGE_CHARS)

    def _column_of(self, problem: ErrorDetails) -> str | None:
        """The column to mend; None when the row as a whole is at fault."""
        if not problem["loc"]:
            return None
        field_name = str(problem["loc"][0])
        return self._plan.sources.get(field_name, field_name)

    def _message(self, problem: ErrorDetails) -> str:
        sensitive = problem["loc"] and problem["loc"][0] in self._model.sensitive_columns
        return f"is not valid ({problem['type']})" if sensitive else problem["msg"]

    def _unknown_key(self, reference: Reference, value: Any) -> Refusal:
        shown = MASK if self._is_secret(reference) else repr(_short(str(value), MAX_SHOWN_CHARS))
        return Refusal(
            "missing_reference",
            f"{reference.column}: there is no {reference.table} with {reference.key} {shown}",
            reference.column,
        )

    def _is_secret(self, reference: Reference) -> bool:
        own = self._model.table.c[reference.field]
        parents = [key.column.table for key in own.foreign_keys]
        return is_sensitive(own) or any(is_sensitive(one.c[reference.key]) for one in parents)


def _picker(columns: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    if len(columns) > 1:
        return attrgetter(*columns)
    return lambda valid: tuple(getattr(valid, name) for name in columns)


def _short(text: str, most_chars: int) -> str:
    return text if len(text) <= most_chars else f"{text[: most_chars - 1]}…"
