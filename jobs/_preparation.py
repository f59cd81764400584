"""From the raw rows of a chunk to values for COPY: selected, mapped, validated by the model."""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Annotated, Any, cast

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from db import bulk
from db.batch import DEFAULT, Layout, Record
from db.catalog import TableFacts
from db.columns import BIGINT_MAX
from db.direct_copy import key_order
from db.refusal import Refusal
from db.registry import Model
from jobs._bulk_validation import bulk_validator
from jobs._mapping import Plan
from jobs._part import ABSENT, Part, Values
from jobs._prepared import Prepared
from jobs._references import Known, OnMissing, Reference
from jobs._wording import Wording, not_storable

_VERSION = TypeAdapter(Annotated[int, Field(ge=0, le=BIGINT_MAX)])


class Preparer:
    """Turns rows into records for one model under one plan."""

    def __init__(
        self, model: Model, plan: Plan, facts: TableFacts, on_missing: OnMissing = "reject"
    ) -> None:
        self._plan = plan
        self._on_missing = on_missing
        self._wording = Wording(model, plan)
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
                missing[reference.field] = self._wording.unknown_key(reference, value)
            else:
                fields[reference.field] = identity
        if missing:
            return self._wording.missing(missing, fields)
        try:
            valid = self._validate(fields)
        except ValidationError as error:
            return self._wording.invalid(error, fields)
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


def _picker(columns: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    if len(columns) > 1:
        return attrgetter(*columns)
    return lambda valid: tuple(getattr(valid, name) for name in columns)


def _is_key(value: Any) -> bool:
    """Whether a value can be a natural key: a text that PostgreSQL can hold."""
    return isinstance(value, str) and "\0" not in value
