"""Jobs of every kind, each with rows and notes of its own, and what the tables must be like then.

Nothing depends on the order in which the jobs run, so that all of it can be told beforehand; of
those that were cancelled, once their receipts say which rows they have committed.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from jobs import Payload
from jobs.insert_rows import InsertRows
from jobs.restore_rows import RestoreRows
from jobs.soft_delete_rows import SoftDeleteRows
from jobs.swap_heroes import SwapHeroes
from jobs.transfer_heroes import TransferHeroes
from jobs.transfer_window import TransferWindow
from jobs.update_rows import UpdateRows
from tests.sample_jobs.act_out import ActOut
from tests.sample_jobs.come_back import ComeBack
from tests.sample_jobs.take_down import TakeDown
from tests.sample_jobs.write_notes import WriteNotes

TEAMS = 20
SHARED = 10
MOST_LATE_S = 5.0
_CHUNKS = 3


@dataclass(frozen=True)
class Hero:
    """What is known of a hero: by external id, and whether he is deleted."""

    external_id: str
    age: int | None
    team_id: int | None
    deleted: bool
    version: int


@dataclass(frozen=True)
class Effect:
    """What a row of a job does: to a hero, who may not be there before, or as a note."""

    before: Hero | None = None
    after: Hero | None = None
    note: str | None = None
    moves: bool = False


NO_EFFECT = Effect()
MOVES = "transfers of heroes who are not shared"
_TAKES_EFFECT = "ARRAY['inserted', 'updated', 'revived', 'deleted', 'restored', 'moved']"
_COMMITTED = f"""
    SELECT key::int, array_agg(row_no) FILTER (WHERE counts ?| {_TAKES_EFFECT})
      FROM bulwark.job JOIN bulwark.idempotency ON job_id = job.id
           LEFT JOIN bulwark.chunk ON chunk.job_id = job.id AND chunk_no > 0
           LEFT JOIN LATERAL generate_series(first_row, first_row + rows - 1) AS row_no ON true
     WHERE state = 'cancelled' GROUP BY key
"""


@dataclass
class Crowd:
    """Makes jobs by chance, and notes down the rows to begin with and what each job does to them.

    `effects` are those of each job by its rows, in their order; a job's place is its idempotency
    key.
    """

    chance: random.Random
    before: list[Hero] = field(default_factory=list)
    payloads: list[Payload] = field(default_factory=list)
    effects: list[list[Effect]] = field(default_factory=list)
    failing: set[int] = field(default_factory=set)
    shared_moves: int = 0

    def gather(self, jobs: int) -> None:
        """Make so many jobs; the heroes that are shared come first."""
        for _ in range(SHARED):
            self._hero(1)
        makers: list[tuple[Callable[[int], Payload], int]] = [
            (self._insert, 12),
            (self._upsert, 10),
            (self._update, 10),
            (self._delete, 10),
            (self._restore, 8),
            (self._transfer, 12),
            (self._transfer_shared, 4),
            (self._swap, 5),
            (self._window, 5),
            (self._act, 8),
            (self._take_down, 6),
            (self._write, 4),
            (self._come_back, 4),
            (self._fail, 2),
        ]
        kinds, weights = zip(*makers, strict=True)
        for n in range(jobs):
            maker = self.chance.choices(kinds, weights)[0]
            self.effects.append([])
            self.payloads.append(maker(n))

    def _hero(self, team_id: int | None = None, *, deleted: bool = False) -> int:
        """A hero to begin with; his id is his place."""
        self.before.append(Hero(f"S{len(self.before) + 1}", 1, team_id, deleted, 1))
        return len(self.before)

    def _does(self, effect: Effect) -> None:
        self.effects[-1].append(effect)

    def _end(self, hero_id: int, *, moves: bool = False, **changes: Any) -> None:
        before = self.before[hero_id - 1]
        after = Hero(**{**vars(before), "version": 2, **changes})
        self._does(Effect(before, after, moves=moves))

    def _team(self) -> int:
        return self.chance.randint(1, TEAMS)

    def _insert(self, n: int) -> Payload:
        """Five rows in chunks of two, one of which is refused."""
        rows: list[Any] = [
            {"name": "New", "external_id": f"I{n}-{i}", "age": i - 1} for i in range(5)
        ]
        self._does(NO_EFFECT)
        for i in range(1, 5):
            self._does(Effect(after=Hero(f"I{n}-{i}", i - 1, None, False, 1)))
        return InsertRows(table="hero", rows=rows, chunk_rows=2)

    def _upsert(self, n: int) -> Payload:
        """Two rows that are there, and one that is new."""
        there = [self._hero(), self._hero()]
        for hero_id in there:
            self._end(hero_id, age=7)
        self._does(Effect(after=Hero(f"U{n}", 7, None, False, 1)))
        names = [*(f"S{hero_id}" for hero_id in there), f"U{n}"]
        return InsertRows(
            table="hero",
            on_conflict="update",
            rows=[{"name": "Hero", "external_id": name, "age": 7} for name in names],
        )

    def _update(self, n: int) -> Payload:
        keys = [self._hero(), self._hero()]
        for hero_id in keys:
            self._end(hero_id, age=n % 90 + 2)
        return UpdateRows(table="hero", keys=[*keys], values={"age": n % 90 + 2}, chunk_rows=1)

    def _delete(self, _: int) -> Payload:
        keys = [self._hero(), self._hero()]
        for hero_id in keys:
            self._end(hero_id, deleted=True)
        return SoftDeleteRows(table="hero", keys=[*keys])

    def _restore(self, _: int) -> Payload:
        keys = [self._hero(deleted=True), self._hero(deleted=True)]
        for hero_id in keys:
            self._end(hero_id, deleted=False)
        return RestoreRows(table="hero", keys=[*keys])

    def _move(self, start: int | None, to: int) -> int:
        hero_id = self._hero(start)
        self._end(hero_id, moves=True, team_id=to)
        return hero_id

    def _transfer(self, _: int) -> Payload:
        start = self._team()
        to = start % TEAMS + 1
        return TransferHeroes(hero_ids=[self._move(start, to)], from_team_id=start, to_team_id=to)

    def _transfer_shared(self, _: int) -> Payload:
        """A hero whom others move, too: the order decides where he ends, and who is refused."""
        self.shared_moves += 1
        hero_id = self.chance.randint(1, SHARED)
        return TransferHeroes(hero_ids=[hero_id], to_team_id=self._team(), from_anywhere=True)

    def _swap(self, _: int) -> Payload:
        a = self._team()
        b = a % TEAMS + 1
        return SwapHeroes(
            team_a_id=a,
            hero_ids_a=[self._move(a, b)],
            team_b_id=b,
            hero_ids_b=[self._move(b, a)],
        )

    def _window(self, _: int) -> Payload:
        """Three transfers in two chunks, and one of a hero who is not there."""
        to = self._team()
        hero_ids = [*(self._move(None, to) for _ in range(3)), 10**9]
        self._does(NO_EFFECT)
        rows: list[Any] = [
            {"hero_id": hero_id, "from_team_id": None, "to_team_id": to} for hero_id in hero_ids
        ]
        return TransferWindow(rows=rows, chunk_rows=2)

    def _act(self, n: int) -> Payload:
        return ActOut(note=self._note(f"acted {n}"))

    def _take_down(self, n: int) -> Payload:
        return TakeDown(note=self._note(f"taken down {n}"))

    def _write(self, _: int) -> Payload:
        for number in range(1, _CHUNKS + 1):
            self._note(f"chunk {number}")
        return WriteNotes(chunks=_CHUNKS)

    def _come_back(self, n: int) -> Payload:
        late_s = self.chance.uniform(0, MOST_LATE_S)
        return ComeBack(note=self._note(f"came back {n}"), at=time.time() + late_s)

    def _fail(self, n: int) -> Payload:
        """It leaves no note, whatever it does."""
        self.failing.add(n)
        return ActOut(note=f"failed {n}", then="fail")

    def _note(self, text: str) -> str:
        self._does(Effect(note=text))
        return text

    async def take_places(self, connection: asyncpg.Connection) -> dict[str, int]:
        """Write the rows to begin with; by table, how many."""
        await connection.execute(
            f"INSERT INTO team (name) SELECT 'T' || n FROM generate_series(1, {TEAMS}) AS n"
        )
        await connection.execute(
            "INSERT INTO hero (name, external_id, age, team_id, deleted_at) "
            "SELECT 'Hero', 'S' || n, 1, team_id, CASE WHEN gone THEN now() END "
            "FROM unnest($1::int[], $2::boolean[]) WITH ORDINALITY AS r (team_id, gone, n) "
            "ORDER BY n",
            [one.team_id for one in self.before],
            [one.deleted for one in self.before],
        )
        return {"team": TEAMS, "hero": len(self.before)}

    async def cancelled(self, connection: asyncpg.Connection) -> dict[int, Collection[int]]:
        """Of the jobs that were cancelled, which rows they have committed by their receipts."""
        return {n: rows or () for n, rows in await connection.fetch(_COMMITTED)}

    async def compare(
        self, connection: asyncpg.Connection, cancelled: Mapping[int, Collection[int]]
    ) -> tuple[list[str], list[str]]:
        """What is missing of that which must be there, and what is there beyond.

        Of the `cancelled` jobs only these rows must have taken effect.
        """
        wanted: Counter[str] = Counter()
        for n, effects in enumerate(self.effects):
            for row_no, effect in enumerate(effects, 1):
                took_effect = n not in cancelled or row_no in cancelled[n]
                hero = effect.after if took_effect else effect.before
                wanted[str(hero)] += hero is not None
                wanted[f"note {effect.note}"] += took_effect and effect.note is not None
                wanted[MOVES] += took_effect and effect.moves
        found = Counter(
            str(Hero(*row))
            for row in await connection.fetch(
                "SELECT external_id, age, team_id, deleted_at IS NOT NULL, version FROM hero "
                f"WHERE id > {SHARED}"
            )
        )
        found += Counter(
            {
                f"note {text}": times
                for text, times in await connection.fetch(
                    "SELECT text, count(*) FROM note GROUP BY text"
                )
            }
        )
        found[MOVES] = await connection.fetchval(
            f"SELECT count(*) FROM transfer WHERE hero_id > {SHARED}"
        )
        missing, beyond = wanted - found, found - wanted
        return [*missing.elements()], [*beyond.elements()]
