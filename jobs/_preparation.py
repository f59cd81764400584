"""From the raw rows of a chunk to values for COPY: selected, mapped, validated by the model."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, time
from functools import cached_property
from operator import attrgetter
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from db import bulk
from db.batch import DEFAULT, Batch, Layout, Record, make_batch
from db.catalog import TableFacts
from db.columns import BIGINT_MAX, is_sensitive
from db.direct_copy import key_order
from db.refusal import Refusal
from db.registry import Model
from jobs._bulk_validation import bulk_validator
from jobs._mapping import Plan, Reference
from jobs._part import ABSENT, Part, Values
from jobs._problems import problems_of, said

Known = Mapping[str, Mapping[str, Any]]
"""For each referencing field: natural key → id of the row it names.

Where it is known that there can be no such row, a Refusal stands in place of the id.
"""

OnMissing = Literal["reject", "create", "null"]
"""What becomes of a row that names, by natural key, a row that is not there."""

MAX_MESSAGE_CHARS = 1000
MAX_SHOWN_CHARS = 100
MASK = "***"
_VERSION = TypeAdapter(Annotated[int, Field(ge=0, le=BIGINT_MAX)])


@dataclass
class Prepared:
    """A chunk's rows, ready to be written: `records[i]` is made of row `positions[i]`.

    `unknown` are the keys by which rows, refused for now, name rows that are still to be made.
    By record, `keys` are those that were drawn for them in an `epoch`, if so; `given` are the
    fields of those that do not give all that the input gives, `expected` the versions they count
    on.
    """

    layout: Layout
    positions: list[int] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    refused: dict[int, Refusal] = field(default_factory=dict)
    filtered: int = 0
    unknown: dict[Reference, set[str]] = field(default_factory=dict)
    keys: Sequence[int] | None = None
    epoch: int | None = None
    given: dict[int, frozenset[str]] = field(default_factory=dict)
    expected: dict[int, int] = field(default_factory=dict)

    def masked(self, index: int, why: Refusal) -> Refusal:
        """What PostgreSQL said of a record without its sensitive values, which a trigger quotes."""
        message = why.message
        for at in self.layout.sensitive:
            if secret := self.records[index][at]:
                message = message.replace(str(secret), MASK)
        return why if message == why.message else replace(why, message=message)

    @cached_property
    def batch(self) -> Batch:
        """The records as they are sent; made when it is first asked for."""
        return make_batch(self.records, self.layout, self.keys)

    def until(self, end: int) -> "Prepared":
        """The part of it that stands before row `end`."""
        count = bisect_left(self.positions, end)
        return Prepared(
            self.layout,
            self.positions[:count],
            self.records[:count],
            {position: why for position, why in self.refused.items() if position < end},
            given={at: given for at, given in self.given.items() if at < count},
            expected={at: version for at, version in self.expected.items() if at < count},
        )


class Preparer:
    """Turns rows into records for one model under one plan."""

    def __init__(
        self, model: Model, plan: Plan, facts: TableFacts, on_missing: OnMissing = "reject"
    ) -> None:
        self._model = model
        self._plan = plan
        self._on_missing = on_missing
        self._given = frozenset(plan.given)
        self._bulk = bulk_validator(model.create, plan.given)
        self.columns = self._bulk.columns if self._bulk else tuple(model.create.model_fields)
        types = {column.name: column.type for column in facts.columns}
        written = [types.get(name, "") for name in self.columns]
        secrets = [at for at, name in enumerate(self.columns) if name in model.sensitive_columns]
        self._layout = Layout(written, key_order(facts, self.columns), secrets)
        self._optional = facts.defaulted & set(self.columns)
        self._validate = model.create.__pydantic_validator__.validate_python
        self._pick = _picker(self.columns)
        self._convert = bulk.bind_processors(model.table, self.columns)

    def wanted_keys(self, part: Part) -> dict[Reference, set[str]]:
        """The natural keys that the rows mention, to be looked up before they are prepared."""
        wanted: dict[Reference, set[str]] = {one: set() for one in self._plan.references}
        if wanted:
            rows = [part.rows[position] for position in self._selected(part)]
            for reference, keys in wanted.items():
                values = (row[reference.index] for row in rows)
                keys.update(value for value in values if _is_key(value))
        return wanted

    def count_filtered(self, part: Part) -> int:
        """How many rows are not part of the input."""
        return len(part.rows) - len(part.faults) - len(self._selected(part))

    def prepare(self, part: Part, known: Known) -> Prepared:
        """Validate every selected row, and write out those that are valid, in a thread."""
        prepared = self.validate(part, known)
        _ = prepared.batch
        return prepared

    def validate(self, part: Part, known: Known) -> Prepared:
        """Validate every selected row; what is wrong with one is its refusal, and no error.

        It takes its time, and belongs in a thread.
        """
        selected = self._selected(part)
        filtered = len(part.rows) - len(part.faults) - len(selected)
        prepared = Prepared(self._layout, refused=dict(part.faults), filtered=filtered)
        rows: Sequence[Values] = part.rows
        if len(selected) < len(rows):
            rows = [part.rows[position] for position in selected]
        records = self._in_bulk(rows, part.complete, known)
        if self._plan.version is None and None not in records:
            prepared.positions = list(selected)
            prepared.records = cast(list[Record], records)
            return prepared
        for position, row, record in zip(selected, rows, records, strict=True):
            outcome = self._alone(row, known, prepared) if record is None else record
            expected = self._expected(row)
            if isinstance(outcome, Refusal):
                prepared.refused[position] = outcome
            elif isinstance(expected, Refusal):
                prepared.refused[position] = expected
                prepared.given.pop(len(prepared.records), None)
            else:
                if expected is not None:
                    prepared.expected[len(prepared.records)] = expected
                prepared.positions.append(position)
                prepared.records.append(outcome)
        return prepared

    def _expected(self, values: Values) -> int | Refusal | None:
        """The version that the row counts on, if it does."""
        value = None if self._plan.version is None else values[self._plan.version]
        if value is None or value is ABSENT:
            return None
        try:
            version: int = _VERSION.validate_python(value)
        except ValidationError:
            return Refusal("invalid", "the expected version is no number of a version", "version")
        return version

    def _selected(self, part: Part) -> Sequence[int]:
        """The positions of the rows that are part of the input and can be read."""
        if not part.faults and not self._plan.filters:
            return range(len(part.rows))
        return [
            position
            for position, values in enumerate(part.rows)
            if position not in part.faults and self._plan.selects(values)
        ]

    def _in_bulk(self, rows: Sequence[Values], complete: bool, known: Known) -> list[Record | None]:
        """The records of the rows that are valid at first sight; None for one to look at alone."""
        if self._bulk is None or not complete or not rows or not self._plan.given:
            return [None] * len(rows)
        fields = self._plan.columnwise(rows)
        unknown: set[int] = set()
        for reference in self._plan.references:
            keys = [row[reference.index] for row in rows]
            ids = [known[reference.field].get(key) if _is_key(key) else None for key in keys]
            unknown.update(at for at, key in enumerate(keys) if key is not None and ids[at] is None)
            fields.append(ids)
        found = self._bulk.validate(list(zip(*fields, strict=True)))
        records = found
        if unknown:
            records = [None if at in unknown else one for at, one in enumerate(found)]
        return list(map(self._storable, records)) if any(self._convert) else records

    def _alone(self, values: Values, known: Known, prepared: Prepared) -> Record | Refusal:
        """Validate one row by the model itself, which knows what to say about it."""
        fields = self._plan.fields(values)
        missing: dict[str, Refusal] = {}
        for reference in self._plan.references:
            value = values[reference.index]
            if value is ABSENT:
                continue
            identity = known[reference.field].get(value) if _is_key(value) else None
            if isinstance(identity, Refusal):
                missing[reference.field] = identity
            elif identity is None and value is not None and self._on_missing != "null":
                if _is_key(value):
                    prepared.unknown.setdefault(reference, set()).add(value)
                missing[reference.field] = self._unknown_key(reference, value)
            else:
                fields[reference.field] = identity
        if missing:
            return self._missing(missing, fields)
        try:
            valid = self._validate(fields)
        except ValidationError as error:
            return self._invalid(error, fields)
        record = self._record(valid)
        given = frozenset(valid.model_fields_set)
        if given != self._given and not isinstance(record, Refusal):
            prepared.given[len(prepared.records)] = given
        return record

    def _record(self, valid: BaseModel) -> Record | Refusal:
        """The values for COPY: None is NULL whatever the type, what nobody set is DEFAULT."""
        record = self._pick(valid)
        if unset := self._optional - valid.model_fields_set:
            record = tuple(
                DEFAULT if value is None and name in unset else value
                for name, value in zip(self.columns, record, strict=True)
            )
        return self._converted(record) if any(self._convert) else record

    def _storable(self, record: Record | None) -> Record | None:
        converted = None if record is None else self._converted(record)
        return None if isinstance(converted, Refusal) else converted

    def _converted(self, record: Record) -> Record | Refusal:
        values = []
        for name, value, convert in zip(self.columns, record, self._convert, strict=True):
            try:
                if convert is not None and value is not None and value is not DEFAULT:
                    value = convert(value)  # noqa: PLW2901 - the bare value is not needed again
                values.append(value)
            except (ValueError, TypeError, LookupError) as error:
                column = self._plan.sources.get(name, name)
                return Refusal("invalid", f"{column}: {not_storable(value, error)}", column)
        return tuple(values)

    def _missing(self, missing: Mapping[str, Refusal], fields: Mapping[str, Any]) -> Refusal:
        """What is wrong with a row that names rows that are not there, as far as fields tell it.

        What a model says about the row as a whole may follow from what is missing.
        """
        told = list(missing.values())
        sentences = [one.message for one in told]
        try:
            self._validate(fields)
        except ValidationError as error:
            others = (one for one in problems_of(error) if {*one["loc"][:1]} - missing.keys())
            sentences += map(self._sentence, others)
        return replace(told[0], message=self._shown("; ".join(sentences), fields))

    def _invalid(self, error: ValidationError, fields: Mapping[str, Any]) -> Refusal:
        problems = problems_of(error)
        text = "; ".join(map(self._sentence, problems))
        return Refusal("invalid", self._shown(text, fields), self._column_of(problems[0]))

    def _sentence(self, problem: ErrorDetails) -> str:
        return f"{self._column_of(problem) or 'row'}: {self._message(problem)}"

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
        return f"is not valid ({problem['type']})" if sensitive else said(problem)

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


def not_storable(value: Any, error: Exception) -> str:
    """Why a valid value does not go into its column, without the value."""
    if isinstance(value, (datetime, time)) and value.utcoffset() is None:
        return "needs a time zone, as in 2030-12-31T23:00:00+01:00 or 2030-12-31T22:00:00Z"
    return f"cannot be stored ({type(error).__name__}); correct the value"


def _picker(columns: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    if len(columns) > 1:
        return attrgetter(*columns)
    return lambda valid: tuple(getattr(valid, name) for name in columns)


def _is_key(value: Any) -> bool:
    """Whether a value can be a natural key: a text that PostgreSQL can hold."""
    return isinstance(value, str) and "\0" not in value


def _short(text: str, most_chars: int) -> str:
    return text if len(text) <= most_chars else f"{text[: most_chars - 1]}…"
