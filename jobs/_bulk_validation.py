"""Validating rows of one model many at a time, without making an object of each.

Pydantic keeps the rules of a model's fields apart from the making of the model. Where the model
has no code of its own that wants to see the whole row, those rules can be applied to plain tuples,
a whole chunk in one call, which is several times as fast and judges the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import SchemaValidator, core_schema
from sqlmodel import SQLModel

from db.batch import Record

_PLAIN_INITS = (SQLModel.__init__, BaseModel.__init__)


@dataclass(frozen=True)
class BulkValidator:
    """The rules of some fields of a model, for rows that give just these fields, in this order.

    `columns` are these fields, then those that the model itself gives a value.
    """

    columns: tuple[str, ...]
    _rows: SchemaValidator
    _tail: Record

    def validate(self, rows: Sequence[Record]) -> list[Record | None]:
        """The records of the rows by position; None for a row that does not pass."""
        try:
            return self._with_tail(self._rows.validate_python(rows))
        except ValidationError as error:
            problems = error.errors(include_url=False, include_context=False, include_input=False)
            failed = {problem["loc"][0] for problem in problems}
        passed = [row for at, row in enumerate(rows) if at not in failed]
        records = iter(self._with_tail(self._rows.validate_python(passed)))
        return [None if at in failed else next(records) for at in range(len(rows))]

    def _with_tail(self, records: list[Record]) -> list[Record | None]:
        return [record + self._tail for record in records] if self._tail else list(records)


def bulk_validator(model: type[BaseModel], given: Sequence[str]) -> BulkValidator | None:
    """The validator of these fields; None when the model wants to see each row as a whole."""
    fields = _plain_fields(model)
    if fields is None or not all(_judges_alone(fields[name]) for name in given):
        return None
    tail: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if name not in given:
            if field.is_required() or field.default_factory:
                return None
            if field.default is not None:
                tail[name] = field.default
    row = core_schema.tuple_schema([fields[name]["schema"] for name in given])
    config = model.__pydantic_core_schema__.get("config")
    rows = SchemaValidator(core_schema.list_schema(row), config)
    return BulkValidator((*given, *tail), rows, tuple(tail.values()))


def _plain_fields(model: type[BaseModel]) -> Mapping[str, Any] | None:
    """The schemas of a model's fields, unless it has validators, or an __init__, of its own."""
    schema: Mapping[str, Any] = model.__pydantic_core_schema__
    plain = (
        schema["type"] == "model"
        and schema["schema"]["type"] == "model-fields"
        and not schema.get("post_init")
        and not schema.get("root_model")
        and model.__init__ in _PLAIN_INITS
    )
    return schema["schema"]["fields"] if plain else None


def _judges_alone(field: Mapping[str, Any]) -> bool:
    """Whether a field's rules look at its value alone, which they find under the field's name."""
    if field.get("validation_alias") is not None:
        return False
    return not any(node.get("type") == "with-info" for node in _nodes(field["schema"]))


def _nodes(schema: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(schema, Mapping):
        yield schema
    inner = schema.values() if isinstance(schema, Mapping) else schema
    if isinstance(inner, (list, tuple)) or isinstance(schema, Mapping):
        for one in inner:
            if isinstance(one, (Mapping, list, tuple)):
                yield from _nodes(one)
