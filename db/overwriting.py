"""The statement that overwrites rows by staged ones and tells what was in them before; SQL only.

What is noted of a row that is met stands in the table MATCH: row_no, when it was deleted, its
place and the transaction in which it got there, which tell whether it is still the same, the
version that it counts, its keys k0, k1, ... and its present values o0, o1, ... by the number of the
column.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from db.catalog import TableFacts, quote
from db.staging import HELD, ROW_NO, STAGE


@dataclass(frozen=True)
class Effect:
    """What happens to rows that are concerned: the audit's name for it, and to which of them.

    `deleted_at` is SQL for what it becomes, if it does; then every row concerned is changed.
    """

    action: str
    to_live: bool
    deleted_at: str | None = None


OVERWRITE = Effect("update", to_live=True)
REVIVE = Effect("revive", to_live=False, deleted_at="NULL")
DELETE = Effect("delete", to_live=True, deleted_at="now()")
RESTORE = Effect("restore", to_live=False, deleted_at="NULL")

MATCH = "bulwark_match"
GIVEN = "bulwark_given"
LIVE_MATCH = "m.deleted_at IS NULL"
DELETED_MATCH = "m.deleted_at IS NOT NULL"


class Overwriting:
    """The SQL for one table and one set of staged columns.

    `kinds` are the sets of columns that rows give; a staged row's GIVEN is the number of its own.
    """

    def __init__(
        self,
        facts: TableFacts,
        columns: Sequence[str],
        kinds: Sequence[frozenset[str]],
        sensitive: Collection[str],
    ) -> None:
        self._facts = facts
        self._kinds = kinds
        self._sensitive = sensitive
        self._places = {column.name: n for n, column in enumerate(facts.columns)}
        self._on_update = {name: sql() for name, sql in facts.on_update.items()}
        self.soft = "deleted_at" in self._places
        self.keys = [f"k{n}" for n in range(len(facts.primary_key))]
        self.columns = [
            name
            for name in columns
            if name not in facts.primary_key and any(name in given for given in kinds)
        ]
        """The columns that some row gives, but the primary key."""

    @property
    def imaged(self) -> list[str]:
        """The columns that an update may change, but those that it always does."""
        if not self._facts.changes_on_update:
            return self.columns
        always = {*self._facts.primary_key, *self._facts.on_update, "deleted_at"}
        names = [column.name for column in self._facts.columns]
        return [name for name in names if name not in always or name in self.columns]

    def picked(self, table: str) -> str:
        """What is noted of a row that is met."""
        own = zip(self._facts.primary_key, self.keys, strict=True)
        keys = [f"{table}.{quote(name)} AS {key}" for name, key in own]
        old = [f"{table}.{quote(name)} AS {self.old(name)}" for name in self.imaged]
        deleted = f"{table}.deleted_at" if self.soft else "CAST(NULL AS timestamptz)"
        version = f"{table}.version" if "version" in self._places else "CAST(NULL AS bigint)"
        found = [f"{table}.ctid AS place", f"{table}.xmin AS born", f"{version} AS version"]
        return ", ".join([f"{deleted} AS deleted_at", *found, *keys, *old])

    def old(self, name: str) -> str:
        return f"o{self._places[name]}"

    def same_row_as_met(self, table: str, met: str) -> str:
        """That a row is the one that was met: by its place, which is quick, if that is unique."""
        if not self._facts.partitioned:
            return f"{table}.ctid = {met}.place"
        own = zip(self._facts.primary_key, self.keys, strict=True)
        return " AND ".join(f"{table}.{quote(name)} = {met}.{key}" for name, key in own)

    def update(self, columns: Sequence[str], span: tuple[int, int] | None, effect: Effect) -> str:
        """Overwrite what differs; returns row_no, key, before, before_sensitive and version.

        OFFSET 0 keeps the planner from computing twice what differs. The source has names of its
        own, so that the model's expressions mean the target's columns.
        """
        source = [f"s.{ROW_NO} AS row_no", "m.place", "m.deleted_at AS was_deleted_at"]
        source.append("m.version AS was_version")
        source += [f"m.{key}" for key in self.keys]
        values: dict[str, str] = {}
        for name in columns:
            old, place = self.old(name), self._places[name]
            source += [f"m.{old}", f"{self._new(name)} AS n{place}"]
            source.append(f"{self._differs(name)} AS d{place}")
            values[quote(name)] = f"n.n{place}"
        source += [f"m.{self.old(name)}" for name in self.imaged if name not in columns]
        values |= {quote(name): sql for name, sql in self._on_update.items() if name not in columns}
        if effect.deleted_at is not None:
            values["deleted_at"] = effect.deleted_at
        where = [LIVE_MATCH if effect.to_live else DELETED_MATCH, f"NOT s.{HELD}"]
        if span is not None:
            where.append(f"s.{ROW_NO} >= {span[0]} AND s.{ROW_NO} < {span[1]}")
        changed = " OR ".join(f"n.d{self._places[name]}" for name in columns)
        if effect.deleted_at is not None:
            changed = "true"
        keys = ", ".join(f"n.{key}" for key in self.keys)
        shown, hidden = self._images(columns, effect)
        return (
            f"UPDATE {self._facts.name} AS t "
            f"SET {', '.join(f'{name} = {value}' for name, value in values.items())} "
            f"FROM (SELECT {', '.join(source)} FROM {MATCH} AS m "
            f"JOIN {STAGE} AS s ON s.{ROW_NO} = m.row_no WHERE {' AND '.join(where)} OFFSET 0) "
            f"AS n WHERE {self.same_row_as_met('t', 'n')} AND ({changed}) "
            f"RETURNING n.row_no, jsonb_build_array({keys}) AS key, {shown} AS before, "
            f"{hidden} AS before_sensitive, n.was_version AS version"
        )

    def _new(self, name: str) -> str:
        """A column's new value: a row that does not give it leaves it as it is."""
        giving = [number for number, given in enumerate(self._kinds) if name in given]
        if len(giving) == len(self._kinds):
            return f"s.{quote(name)}"
        listed = ", ".join(map(str, giving))
        return f"CASE WHEN s.{GIVEN} IN ({listed}) THEN s.{quote(name)} ELSE m.{self.old(name)} END"

    def _differs(self, name: str) -> str:
        old, new = f"m.{self.old(name)}", self._new(name)
        if self._facts.column(name).comparable:
            return f"{old} IS DISTINCT FROM {new}"
        return f"record_image_ne(ROW({old}), ROW({new}))"

    def _images(self, columns: Sequence[str], effect: Effect) -> tuple[str, str]:
        """SQL of what was in the columns that changed: what may be shown, and what may not."""
        parts: dict[bool, list[str]] = {True: [], False: []}
        told_by_row = self._facts.changes_on_update
        for name in self.imaged if told_by_row else columns:
            old = f"n.{self.old(name)}"
            changed = f"n.d{self._places[name]}"
            if told_by_row:
                changed = f"record_image_ne(ROW({old}), ROW(t.{quote(name)}))"
            parts[name in self._sensitive].append(
                f"CASE WHEN {changed} THEN jsonb_build_object({_literal(name)}, {old}) "
                "ELSE '{}' END"
            )
        if effect.deleted_at is not None:
            parts[False].append("jsonb_build_object('deleted_at', n.was_deleted_at)")
        shown = " || ".join(parts[False]) or "CAST(NULL AS jsonb)"
        hidden = " || ".join(parts[True])
        return shown, f"nullif({hidden}, '{{}}')" if hidden else "CAST(NULL AS jsonb)"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
