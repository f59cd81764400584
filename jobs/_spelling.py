"""How a model's Create class spells a value: without white space at its ends, or in capitals."""

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import SchemaValidator, core_schema


def spelling(model: type[BaseModel], name: str) -> Callable[[str], Any]:
    """What makes of a text the value that one field takes from it.

    The rules of the other fields, and of the model as a whole, do not count. A text that the field
    refuses stays as it is.
    """
    validator = _validator(model.__pydantic_core_schema__, name)
    if validator is None:
        return lambda text: text

    def spell(text: str) -> Any:
        try:
            return validator.validate_python({name: text})[0][name]
        except (ValidationError, LookupError, AttributeError):  # it may ask for another field
            return text

    return spell


def _validator(whole: Any, name: str) -> SchemaValidator | None:
    """Validates a dictionary of nothing but the field; None where the model has no such field."""
    schema, config = whole, None
    while schema is not None and schema["type"] != "model-fields":
        config = schema.get("config", config)
        schema = schema.get("schema")
    if schema is None or name not in schema["fields"]:
        return None
    field = core_schema.model_field(schema["fields"][name]["schema"])  # whatever its alias
    alone: Any = core_schema.model_fields_schema({name: field})
    if whole["type"] == "definitions":
        alone = core_schema.definitions_schema(alone, whole["definitions"])
    return SchemaValidator(alone, config)
