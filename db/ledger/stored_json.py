"""JSON that others may have written: what Python cannot read spoils only its own row."""

import json
from typing import Any

import sqlalchemy as sa


class UnreadableJson(str):
    """Why a document that PostgreSQL holds cannot be read by Python."""

    __slots__ = ()


class JsonAsText(sa.types.TypeDecorator[Any]):
    """JSON that a statement returns as text; UnreadableJson where it is too deep, or a number long.

    Returned as JSON it would be read by the driver, where an error takes all rows of the answer.
    """

    impl = sa.Text
    cache_ok = True

    def process_result_value(self, value: str | None, dialect: sa.engine.Dialect) -> Any:
        """The document."""
        if value is None:
            return None
        try:
            return json.loads(value)
        except RecursionError:
            return UnreadableJson("it is nested too deep")
        except ValueError:
            return UnreadableJson("a number in it has too many digits")
