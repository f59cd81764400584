"""Where a column may go, by what it is called and what its values name."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from db.registry import Model
from jobs._column_kinds import Column
from jobs._relations import Relation

_SYNONYMS = {"mail": "email", "emailaddress": "email", "mailaddress": "email", "fullname": "name"}


class Clue(IntEnum):
    """Why a column may belong to a field, from the weakest to the strongest."""

    VALUES = 1
    SYNONYM = 2
    TABLE = 3
    SPELLING = 4
    NAME = 5


_WHY = {
    Clue.VALUES: "its values are there as {target}",
    Clue.SYNONYM: "another word for {target}",
    Clue.TABLE: "named after the table",
    Clue.SPELLING: "the field's name, spelt otherwise",
    Clue.NAME: "the field's name",
}


@dataclass(frozen=True)
class Target:
    """Where a column may go: into a field, or as the natural key of the row that goes there."""

    field: str
    text: str
    clue: Clue

    @property
    def why(self) -> str:
        return _WHY[self.clue].format(target=self.text)


def targets(
    column: Column, model: Model, relations: Sequence[Relation], known_as: set[str]
) -> Iterator[Target]:
    """All that its name lets it be, and the natural keys that it is known as."""
    for name in model.create.model_fields:
        if clue := _clue(column, name, model.name):
            yield Target(name, name, clue)
    for relation in relations:
        for name in relation.names:
            text = relation.target(name)
            if text in known_as:
                named = _names_relation(column.name, relation, name)
                yield Target(relation.field, text, Clue.SPELLING if named else Clue.VALUES)
            elif _is_text(column) and _names_relation(column.name, relation, name):
                yield Target(relation.field, text, Clue.TABLE)


def _clue(column: Column, field_name: str, model_name: str) -> Clue | None:
    name, wanted = plain(column.name), plain(field_name)
    if column.name == field_name:
        return Clue.NAME
    if name == wanted:
        return Clue.SPELLING
    if name == plain(model_name) + wanted or (column.kind == "int" and f"{name}id" == wanted):
        return Clue.TABLE
    return Clue.SYNONYM if _SYNONYMS.get(name) == wanted else None


def _names_relation(column: str, relation: Relation, key: str) -> bool:
    """Whether a column is called as a person would call the row that the foreign key means."""
    nouns = {relation.field.removesuffix("_id"), relation.table}
    words = {plain(noun) for noun in nouns}
    names = {name for word in words for name in (*called(word), word + plain(key))}
    return plain(column) in names


def _is_text(column: Column) -> bool:
    return all(isinstance(value, str) for value in column.values) and column.kind != "int"


def called(noun: str) -> set[str]:
    """What one or several of a kind are called."""
    return {noun, f"{noun}s", f"{noun}es"}


def plain(name: str) -> str:
    """A name without case, accents, spaces and punctuation."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKD", name)).casefold()
