"""What Pydantic finds wrong with values, told in words for those who gave them."""

from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_OWN_CODE = {"value_error": "Value error, ", "assertion_error": "Assertion failed, "}


def problems_of(error: ValidationError) -> list[ErrorDetails]:
    """Its problems, without the values themselves."""
    return error.errors(include_url=False, include_context=False, include_input=False)


def said(problem: ErrorDetails) -> str:
    """The sentence alone, as a validator wrote it."""
    return problem["msg"].removeprefix(_OWN_CODE.get(problem["type"], ""))


def problem_with(create: type[BaseModel], field: str, value: Any) -> ErrorDetails | None:
    """Why the class does not accept the value, whatever it says about the row as a whole."""
    if create.__pydantic_decorators__.model_validators:
        return None  # its own code wants to see whole rows: those of the input will tell
    try:
        create.__pydantic_validator__.validate_python({field: value})
    except ValidationError as error:
        mine = (one for one in problems_of(error) if one["loc"][:1] == (field,))
        return next(mine, None)
    except (LookupError, AttributeError, TypeError):
        return None  # a validator that looks for other fields
    return None
