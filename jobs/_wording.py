"""What is said of a row that is refused: of the columns it came from, and no sensitive value."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, time
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from db.columns import is_sensitive
from db.refusal import Refusal
from db.registry import Model
from jobs._mapping import Plan
from jobs._problems import problems_of, said
from jobs._references import Reference

MAX_MESSAGE_CHARS = 1000
MAX_SHOWN_CHARS = 100
MASK = "***"


@dataclass(frozen=True)
class Wording:
    """The words for rows of one model under one plan."""

    model: Model
    plan: Plan

    def missing(self, missing: Mapping[str, Refusal], fields: Mapping[str, Any]) -> Refusal:
        """What is wrong with a row that names rows that are not there, as far as fields tell it.

        What a model says about the row as a whole may follow from what is missing.
        """
        told = list(missing.values())
        sentences = [one.message for one in told]
        try:
            self.model.create.__pydantic_validator__.validate_python(fields)
        except ValidationError as error:
            others = (one for one in problems_of(error) if {*one["loc"][:1]} - missing.keys())
            sentences += map(self._sentence, others)
        return replace(told[0], message=self._shown("; ".join(sentences), fields))

    def invalid(self, error: ValidationError, fields: Mapping[str, Any]) -> Refusal:
        """Why the model does not accept the row; the first problem names the column to mend."""
        problems = problems_of(error)
        text = "; ".join(map(self._sentence, problems))
        return Refusal("invalid", self._shown(text, fields), self._column_of(problems[0]))

    def unknown_key(self, reference: Reference, value: Any) -> Refusal:
        """Why a row is refused that names a row that is not there, or none that could be."""
        shown = MASK if self._is_secret(reference) else repr(_short(str(value), MAX_SHOWN_CHARS))
        return Refusal(
            "missing_reference",
            f"{reference.column}: there is no {reference.table} with {reference.key} {shown}",
            reference.column,
        )

    def _sentence(self, problem: ErrorDetails) -> str:
        return f"{self._column_of(problem) or 'row'}: {self._message(problem)}"

    def _shown(self, text: str, fields: Mapping[str, Any]) -> str:
        """A validator's words without the sensitive values that they may quote."""
        for name in self.model.sensitive_columns & fields.keys():
            if secret := fields[name]:
                text = text.replace(str(secret), MASK)
        return _short(text.replace("\0", "\\0"), MAX_MESSAGE_CHARS)

    def _column_of(self, problem: ErrorDetails) -> str | None:
        """The column to mend; None when the row as a whole is at fault."""
        if not problem["loc"]:
            return None
        field_name = str(problem["loc"][0])
        return self.plan.sources.get(field_name, field_name)

    def _message(self, problem: ErrorDetails) -> str:
        sensitive = problem["loc"] and problem["loc"][0] in self.model.sensitive_columns
        return f"is not valid ({problem['type']})" if sensitive else said(problem)

    def _is_secret(self, reference: Reference) -> bool:
        own = self.model.table.c[reference.field]
        parents = [key.column.table for key in own.foreign_keys]
        return is_sensitive(own) or any(is_sensitive(one.c[reference.key]) for one in parents)


def not_storable(value: Any, error: Exception) -> str:
    """Why a valid value does not go into its column, without the value."""
    if isinstance(value, (datetime, time)) and value.utcoffset() is None:
        return "needs a time zone, as in 2030-12-31T23:00:00+01:00 or 2030-12-31T22:00:00Z"
    return f"cannot be stored ({type(error).__name__}); correct the value"


def _short(text: str, most_chars: int) -> str:
    return text if len(text) <= most_chars else f"{text[: most_chars - 1]}…"
