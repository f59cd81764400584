"""Why PostgreSQL does not take a row: one code and one sentence for each of its constraints."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from db.catalog import TableFacts
from db.retry import describe, sqlstate

ROW_FAULTS = ("22", "23", "44", "P0001")
"""SQLSTATEs that are about the row: data, constraints, view checks, and what triggers raise."""

NOT_ENCODED = "22000"
UNENCODABLE = (ValueError, TypeError, ArithmeticError, AttributeError, LookupError)
"""What asyncpg raises about a value that it cannot encode for its column; DataError is one."""

CODES = {
    "23502": "not_null_violation",
    "23503": "foreign_key_violation",
    "23505": "unique_violation",
    "23514": "check_violation",
    "23P01": "exclusion_violation",
    "P0001": "trigger_exception",
}
SUPPRESSED = "suppressed"
AMBIGUOUS = "ambiguous_match"
OUTDATED = "version_conflict"
NOT_THERE = "no_such_row"
PASSED_OVER = ("unique_violation", "exclusion_violation", SUPPRESSED)
"""Codes of rows that are no more than skipped where that was asked for."""


@dataclass(frozen=True)
class Refusal:
    """Why a row did not take effect: a code, the constraint or column concerned, and a sentence."""

    code: str
    message: str
    column: str | None = None


def by_constraint(
    facts: TableFacts, code: str, constraint: str | None, column: str | None
) -> Refusal | None:
    """The same sentence for the same constraint, in whichever way the refusal was found."""
    if code == "not_null_violation":
        return Refusal(code, f"{column} must have a value", column)
    for index in facts.unique_indexes:
        if index.name == constraint:
            keys = ", ".join(index.keys)
            return Refusal(code, f"a row with this {keys} is already there ({index.name})", keys)
    for check in facts.checks:
        if check.name == constraint:
            return Refusal(code, f"breaks the rule {check.expression} ({check.name})")
    for key in facts.foreign_keys:
        if key.name == constraint:
            names = ", ".join(key.columns)
            return Refusal(code, f"{names} refers to no row of {key.table} ({key.name})", names)
    return None


def suppressed(facts: TableFacts) -> Refusal:
    """Why a row is not there although PostgreSQL reported no error."""
    text = f"a BEFORE INSERT trigger of {facts.name} left the row out; mend the row or the trigger"
    return Refusal(SUPPRESSED, text)


@asynccontextmanager
async def savepoint(session: AsyncSession) -> AsyncIterator[None]:
    """Undo what the block did when it raises a row's fault, and let it pass on as RowFault."""
    try:
        async with session.begin_nested():
            yield
    except (DBAPIError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        state = sqlstate(error)
        if state is None or not state.startswith(ROW_FAULTS):
            raise
        raise RowFault(state, error) from error


class RowFault(Exception):
    """PostgreSQL refused some row of a statement, and the statement is undone."""

    def __init__(self, state: str, error: Exception) -> None:
        super().__init__(state)
        self.state = state
        self.error = error

    def refusal(self, facts: TableFacts) -> Refusal:
        cause = getattr(self.error, "orig", None)
        detail = getattr(cause, "__cause__", None) or self.error
        code = CODES.get(self.state, "data_exception" if self.state[:2] == "22" else "refused")
        constraint = getattr(detail, "constraint_name", None)
        column = getattr(detail, "column_name", None)
        return by_constraint(facts, code, constraint, column) or Refusal(code, self._text(), column)

    def _text(self) -> str:
        """What PostgreSQL said; asyncpg's own words are left out, for they may quote the value."""
        if isinstance(self.error, UNENCODABLE):
            return f"a value does not fit the type of its column ({type(self.error).__name__})"
        return describe(self.error)
