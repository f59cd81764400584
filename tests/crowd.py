"""Jobs of every kind, each with rows and notes of its own, and what the tables must be like then.

Nothing depends on the order in which the jobs run, so that all of it can be told beforehand.
"""

import random
import time
from collections import Counter
from collections.abc import Callable
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


@dataclass
class Crowd:
    """Makes jobs by chance, and notes down the rows to begin with and those to end with."""

    chance: random.Random
    before: list[Hero] = field(default_factory=list)
    after: list[Hero] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    payloads: list[Payload] = field(default_factory=list)
    failing: int = 0
    shared_moves: int = 0
    moves: int = 0

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
            self.payloads.append(maker(n))

    def _hero(self, team_id: int | None = None, *, deleted: bool = False) -> int:
        """A hero to begin with; his id is his place."""
        self.before.append(Hero(f"S{len(self.before) + 1}", 1, team_id, deleted, 1))
        return len(self.before)

    def _end(self, hero_id: int, **changes: Any) -> None:
        self.after.append(Hero(**{**vars(self.before[hero_id - 1]), "version": 2, **changes}))

    def _team(self) -> int:
        return self.chance.randint(1, TEAMS)

    def _insert(self, n: int) -> Payload:
        """Five rows in chunks of two, one of which is refused."""
        rows: list[Any] = [
            {"name": "New", "external_id": f"I{n}-{i}", "age": i - 1} for i in range(5)
        ]
        self.after += [Hero(f"I{n}-{i}", i - 1, None, False, 1) for i in range(1, 5)]
        return InsertRows(table="hero", rows=rows, chunk_rows=2)

    def _upsert(self, n: int) -> Payload:
        """Two rows that are there, and one that is new."""
        there = [self._hero(), self._hero()]
        for hero_id in there:
            self._end(hero_id, age=7)
        self.after.append(Hero(f"U{n}", 7, None, False, 1))
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
        self._end(hero_id, team_id=to)
        self.moves += 1
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
        self.failing += 1
        return ActOut(note=f"failed {n}", then="fail")

    def _note(self, text: str) -> str:
        self.notes[text] += 1
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

    async def compare(self, connection: asyncpg.Connection) -> tuple[list[str], list[str]]:
        """What is missing of that which must be there, and what is there beyond."""
        wanted = Counter({str(one): 1 for one in self.after})
        wanted += Counter({f"note {text}": times for text, times in self.notes.items()})
        wanted["transfers of heroes who are not shared"] = self.moves
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
        found["transfers of heroes who are not shared"] = await connection.fetchval(
            f"SELECT count(*) FROM transfer WHERE hero_id > {SHARED}"
        )
        missing, beyond = wanted - found, found - wanted
        return [*missing.elements()], [*beyond.elements()]
