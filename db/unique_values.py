"""The values that rows have in the unique indexes of a table, as far as a look at them tells."""

import re
from collections.abc import Collection, Sequence
from operator import itemgetter
from typing import Any

from db.batch import Record
from db.catalog import TableFacts, UniqueIndex, quote

UniqueValues = Sequence[set[Any]]
"""One set for each unique index that the rows fill."""


def unique_values(
    facts: TableFacts, columns: Sequence[str], records: Sequence[Record]
) -> UniqueValues | None:
    """None where it takes PostgreSQL to tell whether two rows have the same in some index."""
    found = []
    for index in facts.unique_indexes:
        if stays_apart(facts, index, columns):
            continue
        places = places_in(facts, index, columns)
        if places is None:
            return None
        values = set(map(itemgetter(*places), records))
        found.append(values if index.nulls_equal else {one for one in values if not _has_null(one)})
    return found


def disjoint(some: UniqueValues | None, others: UniqueValues | None) -> bool:
    """Whether it is certain that no row of the ones has a key of the others."""
    if some is None or others is None:
        return False
    return all(one.isdisjoint(other) for one, other in zip(some, others, strict=True))


def places_in(
    facts: TableFacts, index: UniqueIndex, columns: Sequence[str]
) -> Sequence[int] | None:
    """Where in a row the values of an index stand.

    None if they are not all given, or if PostgreSQL may find two the same that look different.
    """
    found = [facts.by_key.get(key) for key in index.keys]
    if any(one is None or not one.comparable or one.name not in columns for one in found):
        return None
    return [columns.index(one.name) for one in found if one is not None]


def stays_apart(facts: TableFacts, index: UniqueIndex, columns: Sequence[str]) -> bool:
    """Whether rows with these columns clash with none in the index, whatever their values.

    The database draws the primary key, or leaves something null in each of them.
    """
    key = facts.primary_key
    if index.keys in (key, tuple(map(quote, key))):
        return all(name in facts.defaulted and name not in columns for name in key)
    known = [one for key in index.keys if (one := facts.by_key.get(key))]
    left_out = [one for one in known if one.name not in columns]
    return not index.nulls_equal and any(one.default is None for one in left_out)


def touched_by(index: UniqueIndex, columns: Collection[str]) -> bool:
    """Whether a row may have another place in the index once these columns have other values."""
    told = " ".join([*index.keys, index.predicate or ""])
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", told) for name in columns)


def _has_null(value: Any) -> bool:
    return value is None or (isinstance(value, tuple) and None in value)
