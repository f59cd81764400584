"""What refers to the rows of a model, and what becomes of it when they are deleted or restored."""

from collections.abc import Mapping
from dataclasses import replace

from sqlalchemy.ext.asyncio import AsyncSession

from db.catalog import read_facts
from db.columns import OnParentDeleted
from db.dependents import Dependents
from db.references import Reference, references_from, references_to
from db.registry import Model, Registry
from jobs._errors import InputError
from jobs._nearest import did_you_mean


async def read_dependents(
    session: AsyncSession,
    models: Registry,
    model: Model,
    wanted: Mapping[str, OnParentDeleted],
) -> Dependents:
    """The relationships of a model, as declared or as wanted, and those that they lead to.

    Raises InputError when a wanted one is none of them.
    """
    tables = [one.table for one in models.values()]
    found: dict[str, list[Reference]] = {}
    pending = [model.table]
    while pending:
        table = pending.pop(0)
        if table.name in found:
            continue
        found[table.name] = [_as_wanted(one, wanted) for one in references_to(table, tables)]
        cascading = (one for one in found[table.name] if one.on_parent_deleted == "cascade")
        pending += [one.table for one in cascading]
    _require_known(wanted, found)
    children = [model.table, *(one.table for several in found.values() for one in several)]
    parents = {
        table.name: [_as_wanted(one, wanted) for one in references_from(table)]
        for table in children
    }
    concerned = {table.name: table for table in children}
    concerned |= {one.parent.name: one.parent for several in parents.values() for one in several}
    facts = {name: await read_facts(session, table) for name, table in concerned.items()}
    return Dependents(found, parents, facts)


def _as_wanted(reference: Reference, wanted: Mapping[str, OnParentDeleted]) -> Reference:
    policy = wanted.get(reference.name, reference.on_parent_deleted)
    return replace(reference, on_parent_deleted=policy)


def _require_known(
    wanted: Mapping[str, OnParentDeleted], found: Mapping[str, list[Reference]]
) -> None:
    known = [one.name for several in found.values() for one in several]
    for name in wanted:
        if name not in known:
            near = did_you_mean(name, known)
            raise InputError(f"--references: no relationship is named {name!r}{near}")
