"""Trying an import on a sample: which rows would be rejected, and which parents are missing."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from db.catalog import TableFacts
from db.columns import INTEGER_MAX
from db.ledger.chunk import Span
from db.refusal import Refusal
from db.registry import Model, Registry
from jobs._errors import InputError
from jobs._mapping import Plan
from jobs._parents import Parent, Parents, not_creatable
from jobs._part import Part
from jobs._preparation import Preparer
from jobs._prepared import Prepared
from jobs._references import OnMissing, Reference, natural_key


@dataclass(frozen=True)
class Reject:
    """A row of the sample that would be rejected."""

    line: int
    column: str | None
    code: str
    reason: str


@dataclass(frozen=True)
class Trial:
    """What became of a sample; `missing` counts the rows of other tables that are not there."""

    plan: Plan
    parents: Parents
    rejects: Sequence[Reject]
    filtered: int
    missing: Mapping[Reference, int]


def parents_of(
    child: TableFacts,
    references: Sequence[Reference],
    models: Registry,
    facts: Mapping[str, TableFacts],
) -> Parents:
    """Where the references lead, as the job will find it. Raises InputError as it does."""
    parents = {}
    for one in references:
        model = models.get(one.table)
        key = natural_key(model.table, facts[model.name], one.key)
        parents[one] = Parent(model, facts[model.name], key)
    return Parents(child, parents)


def is_creatable(parents: Parents, reference: Reference) -> bool:
    """Whether a missing row can be made of nothing but its natural key."""
    try:
        parents.parents[reference].require_creatable(reference)
    except InputError:
        return False
    return True


async def try_part(
    session: AsyncSession,
    model: Model,
    plan: Plan,
    parents: Parents,
    part: Part,
    on_missing: OnMissing,
) -> Trial:
    """Prepare the rows as the job would, and what it would create as if it had been created.

    Raises InputError when a row that is to be created cannot be.
    """
    create = on_missing == "create"
    if create:
        for reference, parent in parents.parents.items():
            parent.require_creatable(reference)
    preparer = Preparer(model, plan, parents.child, on_missing)
    known = await parents.ids(session, preparer.wanted_keys(part))
    prepared = await asyncio.to_thread(preparer.prepare, part, known)
    counts = {reference: len(keys) for reference, keys in prepared.unknown.items()}
    if create and counts:
        made = {
            one: _as_if_created(one, parents.parents[one], sorted(keys))
            for one, keys in prepared.unknown.items()
        }
        complete = dict(known)
        for one, ids in made.items():
            complete[one.field] = {**known[one.field], **ids}
            counts[one] = sum(not isinstance(identity, Refusal) for identity in ids.values())
        prepared = await asyncio.to_thread(preparer.prepare, part, complete)
    return Trial(plan, parents, _rejects(part, prepared), prepared.filtered, counts)


def _rejects(part: Part, prepared: Prepared) -> list[Reject]:
    return [
        Reject(part.lines[at], why.column, why.code, why.message)
        for at, why in sorted(prepared.refused.items())
    ]


def _as_if_created(reference: Reference, parent: Parent, keys: Sequence[str]) -> Mapping[str, Any]:
    """For each key the id that its row could have, or why there can be none."""
    span = Span(1, len(keys), 0, 0, 1, 1)
    rows = Part(1, span, [[key] for key in keys], range(len(keys)), [b""] * len(keys), {})
    refused = parent.preparer.prepare(rows, {}).refused
    kind = parent.model.table.c[reference.target].type.python_type
    return {
        key: not_creatable(reference, refused[at]) if at in refused else _identity(kind, key, at)
        for at, key in enumerate(keys)
    }


def _identity(kind: type[Any], key: str, number: int) -> Any:
    """A value that a column of this type could give the row; no two rows get the same."""
    if kind is str:
        return key
    return UUID(int=number) if kind is UUID else INTEGER_MAX - number
