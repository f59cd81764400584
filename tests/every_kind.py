"""Jobs of every kind, each on rows of its own, and what must have become of those.

Each is named `Task` here, since the worker carries one or several jobs out for it. What is expected
follows from its payload alone, whatever happens to the workers meanwhile.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from backports import zstd

from db.steps import Step
from jobs._declaration import Payload
from jobs._housekeeping import Housekeeping
from jobs._spooling import enqueue_file
from jobs.insert_rows import InsertRows
from jobs.maintain_ledger import MaintainLedger
from jobs.purge_deleted_rows import PurgeDeletedRows
from jobs.restore_archive import RestoreArchive
from jobs.restore_rows import RestoreRows
from jobs.seal_audit import SealAudit
from jobs.soft_delete_rows import SoftDeleteRows
from jobs.swap_heroes import SwapHeroes
from jobs.transfer_heroes import TransferHeroes
from jobs.transfer_window import TransferWindow
from jobs.update_rows import UpdateRows
from tests.inprocess import Bench
from tests.invariants import Losses, check_invariants
from tests.stage import Stage
from tests.workers import until

ROWS = 12
CHUNK_ROWS = 4
MIDST = 3
"""The first chunk is the opening, the second the first of rows."""
ONCE = frozenset({Step.CLAIMED, Step.ENDING, Step.ENDED})
SINGLE = frozenset(Step) - {Step.RECEIPTED, Step.COPYING, Step.ENDING}
CHUNKED = frozenset(Step) - {Step.COPYING}
COPYING = frozenset(Step)
OLD = "'2020-02-01'"
KEPT = UUID("01900000-0000-7000-8000-000000000000")
"""The purge whose archive is restored."""
GONE = UUID("01900000-0000-7000-8000-000000000001")
"""A job of which the audit alone is left."""
HOME, GUEST = 1, 2
"""Of the teams of a task."""


def heroes(first: int, *, deleted_at: str = "NULL", team: str = "NULL") -> str:
    return (
        "INSERT INTO hero (id, name, age, team_id, deleted_at) "
        f"SELECT {first} + n, 'Hero ' || {first} + n, 20, {team}, {deleted_at} "
        f"FROM generate_series(1, {ROWS}) AS n;"
    )


def teams(first: int) -> str:
    return (
        "INSERT INTO team (id, name) "
        f"VALUES ({first + HOME}, 'Home {first}'), ({first + GUEST}, 'Guests {first}');"
    )


def captain(first: int, team: int) -> str:
    return (
        "INSERT INTO membership (hero_id, team_id, role) "
        f"VALUES ({first + 1}, {first + team}, 'captain');"
    )


def ids(first: int, least: int = 1, most: int = ROWS) -> list[int]:
    return [first + n for n in range(least, most + 1)]


@dataclass(frozen=True)
class Task:
    """What is asked for, of rows whose ids begin behind `first`, and what comes of it.

    `look` is a query whose rows must be `found`; `verdicts` are those of all jobs together, and
    `audit` the rows by action and table. `steps` are those that its jobs come by, those that come
    often in the midst of it at the number `nth`. `end` is how each of them ends.
    """

    name: str
    first: int
    seed: str
    payloads: Sequence[Payload]
    look: str
    found: Sequence[tuple[Any, ...]]
    verdicts: Mapping[str, int]
    audit: Mapping[tuple[str, str], int]
    steps: frozenset[Step] = CHUNKED
    nths: Mapping[Step, int] = field(default_factory=dict)
    file: str | None = None
    pieces: Path | None = None
    end: tuple[str, str | None, int] = ("succeeded", None, 0)

    @property
    def kinds(self) -> set[str]:
        """Of its jobs, as workers know them."""
        classes = [*map(type, self.payloads)] or [InsertRows]
        return {re.sub("(?<!^)(?=[A-Z])", "_", one.__name__).lower() for one in classes}

    def nth(self, step: Step) -> int:
        usual = 1 if step in ONCE or self.steps == SINGLE else MIDST
        return self.nths.get(step, usual)


def insert_rows(first: int, _: Path) -> Task:
    rows: list[dict[str, Any]] = [{"name": f"New {n:02}"} for n in range(ROWS)]
    rows[5]["roster_limit"] = -1
    return Task(
        "insert_rows",
        first,
        "",
        [InsertRows(table="team", rows=rows, chunk_rows=CHUNK_ROWS)],
        "SELECT name, version FROM team WHERE name LIKE 'New %' ORDER BY name",
        [(f"New {n:02}", 1) for n in range(ROWS) if n != 5],
        {"inserted": ROWS - 1, "rejected": 1},
        {("insert", "team"): ROWS - 1},
        COPYING,
        {Step.COPYING: 2},
    )


def rejected_import(first: int, _: Path) -> Task:
    """It fails at its first reject, and then counts the rows behind it in a chunk of its own."""
    rows: list[dict[str, Any]] = [{"name": f"Kept {n:02}"} for n in range(ROWS)]
    rows[5]["roster_limit"] = -1
    closing = (Step.FENCED, Step.RECEIPTED, Step.APPLIED, Step.COMMITTING, Step.COMMITTED)
    return Task(
        "rejected_import",
        first,
        "",
        [InsertRows(table="team", rows=rows, chunk_rows=CHUNK_ROWS, max_rejects=0)],
        "SELECT name, version FROM team WHERE name LIKE 'Kept %' ORDER BY name",
        [(f"Kept {n:02}", 1) for n in range(5)],
        {"inserted": 5, "rejected": 1, "not_reached": ROWS - 6},
        {("insert", "team"): 5},
        nths=dict.fromkeys(closing, MIDST + 1),
        end=("failed", "rejected", 1),
    )


def spooled_import(first: int, _: Path) -> Task:
    ages = [n if n != 6 else -1 for n in range(ROWS)]
    return Task(
        "spooled_import",
        first,
        "",
        [],
        "SELECT external_id, age, version FROM hero WHERE name = 'Spooled' ORDER BY external_id",
        [(f"S{n:02}", n, 1) for n in range(ROWS) if n != 6],
        {"inserted": ROWS - 1, "rejected": 1},
        {("insert", "hero"): ROWS - 1},
        COPYING,
        {Step.COPYING: 2},
        file="name,external_id,age\n"
        + "".join(f"Spooled,S{n:02},{age}\n" for n, age in enumerate(ages)),
    )


def _ages(first: int) -> str:
    return f"SELECT id, age, version FROM hero WHERE id BETWEEN {first} AND {first + 99} ORDER BY 1"


def update_rows(first: int, _: Path) -> Task:
    keys = [*ids(first, most=ROWS - 1), first + 99]
    return Task(
        "update_rows",
        first,
        heroes(first),
        [UpdateRows(table="hero", keys=[*keys], values={"age": 40}, chunk_rows=CHUNK_ROWS)],
        _ages(first),
        [*((hero, 40, 2) for hero in keys[:-1]), (first + ROWS, 20, 1)],
        {"updated": ROWS - 1, "missing": 1},
        {("update", "hero"): ROWS - 1},
        COPYING,
        {Step.COPYING: 2},
    )


def update_at_once(first: int, _: Path) -> Task:
    at_once = {Step.FENCED: 2, Step.COMMITTING: 2, Step.COMMITTED: 2, Step.COPYING: 2}
    keys = ids(first)
    return Task(
        "update_at_once",
        first,
        heroes(first),
        [
            UpdateRows(
                table="hero", keys=[*keys], values={"age": 41}, chunk_rows=CHUNK_ROWS, atomic=True
            )
        ],
        _ages(first),
        [(hero, 41, 2) for hero in keys],
        {"updated": ROWS},
        {("update", "hero"): ROWS},
        COPYING,
        at_once,
    )


def _lives(first: int) -> str:
    return (
        "SELECT hero.id, hero.deleted_at IS NULL, hero.version, membership.deleted_at IS NULL, "
        "membership.version FROM hero LEFT JOIN membership ON hero_id = hero.id "
        f"WHERE hero.id BETWEEN {first} AND {first + 99} ORDER BY 1"
    )


def soft_delete_rows(first: int, _: Path) -> Task:
    keys = ids(first, most=ROWS - 1)
    return Task(
        "soft_delete_rows",
        first,
        teams(first) + heroes(first) + captain(first, HOME),
        [SoftDeleteRows(table="hero", keys=[*keys], chunk_rows=CHUNK_ROWS)],
        _lives(first),
        [
            (first + 1, False, 2, False, 2),
            *((hero, False, 2, True, None) for hero in keys[1:]),
            (first + ROWS, True, 1, True, None),
        ],
        {"deleted": ROWS - 1},
        {("delete", "hero"): ROWS - 1, ("delete", "membership"): 1},
        COPYING,
        {Step.COPYING: 2},
    )


def restore_rows(first: int, _: Path) -> Task:
    keys = ids(first, most=ROWS - 1)
    return Task(
        "restore_rows",
        first,
        heroes(first, deleted_at=OLD),
        [RestoreRows(table="hero", keys=[*keys], chunk_rows=CHUNK_ROWS)],
        _lives(first),
        [*((hero, True, 2, True, None) for hero in keys), (first + ROWS, False, 1, True, None)],
        {"restored": ROWS - 1},
        {("restore", "hero"): ROWS - 1},
        COPYING,
        {Step.COPYING: 2},
    )


def _moves(first: int) -> str:
    return (
        f"SELECT hero.id - {first}, hero.team_id - {first}, hero.version, "
        f"from_team_id - {first}, to_team_id - {first}, "
        "(SELECT count(*) FROM membership WHERE hero_id = hero.id AND deleted_at IS NULL) "
        "FROM hero LEFT JOIN transfer ON hero_id = hero.id "
        f"WHERE hero.id BETWEEN {first} AND {first} + 99 ORDER BY 1"
    )


def _league(first: int) -> str:
    return teams(first) + heroes(first, team=f"{first + HOME}") + captain(first, HOME)


def _moved(heroes: int) -> dict[tuple[str, str], int]:
    return {("move", "hero"): heroes, ("insert", "transfer"): heroes, ("end", "membership"): 1}


_GONE = [(n, GUEST, 2, HOME, GUEST, 0) for n in range(1, ROWS + 1)]


def transfer_heroes(first: int, _: Path) -> Task:
    who, from_team, to_team = ids(first), first + HOME, first + GUEST
    return Task(
        "transfer_heroes",
        first,
        _league(first),
        [TransferHeroes(hero_ids=who, from_team_id=from_team, to_team_id=to_team)],
        _moves(first),
        _GONE,
        {"moved": ROWS},
        _moved(ROWS),
        SINGLE,
    )


def transfer_batch(first: int, _: Path) -> Task:
    return Task(
        "transfer_batch",
        first,
        _league(first),
        [
            TransferHeroes(hero_ids=[hero], from_team_id=first + HOME, to_team_id=first + GUEST)
            for hero in ids(first)
        ],
        _moves(first),
        _GONE,
        {"moved": ROWS},
        _moved(ROWS),
        SINGLE,
    )


def swap_heroes(first: int, _: Path) -> Task:
    a, b = ids(first, 1, 5), ids(first, 6, ROWS)
    return Task(
        "swap_heroes",
        first,
        _league(first) + f"UPDATE hero SET team_id = {first + GUEST} WHERE id IN "
        f"({', '.join(map(str, b))});",
        [SwapHeroes(team_a_id=first + HOME, hero_ids_a=a, team_b_id=first + GUEST, hero_ids_b=b)],
        _moves(first),
        [
            (n, GUEST, 2, HOME, GUEST, 0) if n <= 5 else (n, HOME, 2, GUEST, HOME, 0)
            for n in range(1, ROWS + 1)
        ],
        {"moved": ROWS},
        _moved(ROWS),
        SINGLE,
    )


def transfer_window(first: int, _: Path) -> Task:
    rows: list[dict[str, Any]] = [
        {"hero_id": hero, "from_team_id": first + HOME, "to_team_id": first + GUEST}
        for hero in ids(first)
    ]
    return Task(
        "transfer_window",
        first,
        _league(first),
        [TransferWindow(rows=rows, chunk_rows=CHUNK_ROWS)],
        _moves(first),
        _GONE,
        {"moved": ROWS},
        _moved(ROWS),
    )


def purge_deleted_rows(first: int, folder: Path) -> Task:
    due = (
        "INSERT INTO membership (id, hero_id, team_id, role, deleted_at) "
        f"SELECT {first} + n, {first} + n, {first + HOME}, 'due', {OLD} "
        f"FROM generate_series(1, {ROWS}) AS n;"
    )
    return Task(
        "purge_deleted_rows",
        first,
        teams(first) + heroes(first) + due + captain(first, HOME),
        [
            PurgeDeletedRows(
                tables=["membership"],
                retention_days={"membership": 30},
                archive=str(folder / "purged"),
                batch_rows=CHUNK_ROWS,
                target_s=0.0001,
            )
        ],
        "SELECT role FROM membership "
        f"WHERE hero_id BETWEEN {first} AND {first + 99} AND version = 1",
        [("captain",)],
        {"purged": ROWS},
        {("purge", "membership"): ROWS},
        pieces=folder / "purged",
    )


def restore_archive(first: int, folder: Path) -> Task:
    """What a purge has archived before."""
    done = (
        "INSERT INTO transfer (id, hero_id, to_team_id, deleted_at) "
        f"SELECT {first} + n, {first} + n, {first + HOME}, {OLD} "
        f"FROM generate_series(1, {ROWS}) AS n;"
    )
    return Task(
        "restore_archive",
        first,
        teams(first) + heroes(first, team=f"{first + HOME}") + done,
        [RestoreArchive(archive=str(folder / "kept" / str(KEPT)))],
        f"SELECT id, version FROM transfer WHERE hero_id BETWEEN {first} AND {first + 99} "
        f"AND deleted_at = {OLD} ORDER BY 1",
        [(transfer, 1) for transfer in ids(first)],
        {"inserted": ROWS},
        {("insert", "transfer"): ROWS},
    )


def maintain_ledger(first: int, _: Path) -> Task:
    return Task(
        "maintain_ledger",
        first,
        "INSERT INTO bulwark.job (id, kind, payload, state, max_attempts, timeout_s, created_at, "
        f"finished_at) SELECT bulwark.uuid_floor({OLD}::timestamptz + n * interval '1 s'), "
        f"'old', '{{}}', 'succeeded', 1, 1, {OLD}, {OLD} FROM generate_series(1, {ROWS}) AS n;",
        [MaintainLedger(retention_days={"job": 30}, batch_rows=CHUNK_ROWS, target_s=0.0001)],
        "SELECT id FROM bulwark.job WHERE kind = 'old'",
        [],
        {"purged": ROWS},
        {("purge", "bulwark.job"): ROWS},
        nths=dict.fromkeys((Step.FENCED, Step.RECEIPTED, Step.APPLIED, Step.COMMITTING), 2),
    )


def seal_audit(first: int, _: Path) -> Task:
    """It seals what the others have audited so far, too: each row up to there is in one segment."""
    old = (
        "INSERT INTO bulwark.audit (job_id, chunk_no, entry_no, xid, claim_id, kind, action, "
        f"table_name, rows, keys) SELECT '{GONE}', 1, n, (100 + n)::text::xid8, '{GONE}', "
        f"'old', 'old', 'old', 1, '{{}}' FROM generate_series(1, {ROWS}) AS n;"
    )
    last = "(SELECT below_xid FROM bulwark.seal ORDER BY segment DESC LIMIT 1)"
    return Task(
        "seal_audit",
        first,
        old,
        [SealAudit(segment_rows=CHUNK_ROWS)],
        f"SELECT {last} > '112'::xid8, "
        "(SELECT count(*) FROM bulwark.audit AS a WHERE (SELECT count(*) FROM bulwark.seal "
        f"WHERE a.xid >= from_xid AND a.xid < below_xid) <> 1 AND a.xid < {last}), "
        "(SELECT sum(rows)::int FROM bulwark.seal) - "
        f"(SELECT count(*) FROM bulwark.audit WHERE xid < {last})",
        [(True, 0, 0)],
        {},
        {},
    )


MAKERS: Sequence[Callable[[int, Path], Task]] = (
    insert_rows,
    transfer_heroes,
    purge_deleted_rows,
    spooled_import,
    transfer_batch,
    restore_archive,
    update_rows,
    swap_heroes,
    maintain_ledger,
    soft_delete_rows,
    update_at_once,
    restore_rows,
    transfer_window,
    rejected_import,
    seal_audit,
)


def every_task(folder: Path) -> list[Task]:
    """One of each, on rows that do not meet; their archives are in the folder."""
    return [make(1000 * number, folder) for number, make in enumerate(MAKERS, 1)]


EVERYTHING = """
    SELECT (SELECT json_agg(t ORDER BY id) FROM team t)::text,
           (SELECT json_agg(t ORDER BY id) FROM hero t)::text,
           (SELECT json_agg(t ORDER BY id) FROM membership t)::text,
           (SELECT json_agg(t ORDER BY id) FROM transfer t)::text,
           (SELECT json_agg(t ORDER BY id) FROM bulwark.job t)::text,
           (SELECT json_agg(t ORDER BY job_id, chunk_no) FROM bulwark.chunk t)::text,
           (SELECT json_agg(t ORDER BY job_id, row_no) FROM bulwark.verdict t)::text,
           (SELECT json_agg(t ORDER BY job_id, chunk_no, entry_no) FROM bulwark.audit t)::text
"""
SEEDED_BEHIND = """
    SELECT setval(pg_get_serial_sequence(name, 'id'), 100000)
      FROM unnest(ARRAY['team', 'hero', 'membership', 'transfer']) AS name
"""


class Field:
    """A database on which tasks are done, and a look at what has become of each."""

    def __init__(self, bench: Bench, stage: Stage, url: str, folder: Path) -> None:
        self._bench = bench
        self._url = url
        self._folder = folder
        self.stage = stage
        self.jobs: dict[str, list[UUID]] = {}
        self.seeded: dict[str, int] = {}

    async def seed(self, tasks: Sequence[Task]) -> None:
        """Write the rows that the tasks are about; the archive to be restored comes of a purge."""
        for task in tasks:
            await self.stage.execute(task.seed or "SELECT")
        await self.stage.execute(SEEDED_BEHIND)
        if any(isinstance(one, RestoreArchive) for task in tasks for one in task.payloads):
            self._bench.housekeeping = Housekeeping({}, {}, [self._folder])
            kept = PurgeDeletedRows(
                tables=["transfer"],
                retention_days={"transfer": 30},
                archive=str(self._folder / "kept"),
                batch_rows=CHUNK_ROWS,
                target_s=0.0001,
            )
            await self._bench.producer.enqueue(kept, job_id=KEPT)
            await self._bench.deliver(KEPT)
            await self.stage.becomes(KEPT, "succeeded")
        for table in ("team", "hero", "membership", "transfer"):
            self.seeded[table] = await self.stage.value(f"SELECT count(*) FROM {table}")

    async def accept(self, task: Task, **terms: Any) -> list[UUID]:
        """Enqueue the jobs of a task; nobody is told."""
        if task.file is None:
            done = await self._bench.producer.enqueue_many(task.payloads, actor="tester", **terms)
            accepted = [one.job_id for one in done]
        else:
            path = self._folder / "spooled.csv"
            path.write_text(task.file)
            request = {"table": "hero", "chunk_rows": CHUNK_ROWS}
            one = await enqueue_file(self._bench.producer, path, request, actor="tester", **terms)
            accepted = [one.job_id]
        self.jobs[task.name] = accepted
        return accepted

    async def left(self, task: Task) -> int:
        """How many jobs of the task have not ended."""
        left: int = await self.stage.value(
            "SELECT count(*) FROM bulwark.job WHERE id = ANY ($1) AND finished_at IS NULL",
            self.jobs[task.name],
        )
        return left

    async def crashes(self, task: Task) -> Counter[int]:
        rows = await self.stage.rows(
            "SELECT crashes FROM bulwark.job WHERE id = ANY ($1)", self.jobs[task.name]
        )
        return Counter(row[0] for row in rows)

    async def check(self, task: Task) -> None:
        """Compare rows, verdicts, receipts, audit and archive with what was asked for."""
        job_ids = self.jobs[task.name]
        ends = Counter([await self.stage.ended_as(job_id) for job_id in job_ids])
        assert ends == {task.end: len(job_ids)}, task.name
        assert await self.stage.rows(task.look) == [*task.found], task.name
        counted = await self.stage.rows(
            "SELECT key, sum(value::bigint)::int FROM (SELECT counts FROM bulwark.chunk "
            "WHERE job_id = ANY ($1) UNION ALL SELECT outcome -> 'verdicts' FROM bulwark.job "
            "WHERE id = ANY ($1) AND NOT EXISTS (SELECT FROM bulwark.chunk WHERE job_id = id)) "
            "AS told (counts), jsonb_each_text(counts) GROUP BY key",
            job_ids,
        )
        assert dict(counted) == task.verdicts, task.name
        audit = await self.stage.rows(
            "SELECT action, table_name, sum(rows)::int FROM bulwark.audit "
            "WHERE job_id = ANY ($1) GROUP BY 1, 2",
            job_ids,
        )
        assert {(action, table): rows for action, table, rows in audit} == task.audit, task.name
        if task.pieces is not None:
            assert archived(task.pieces / str(job_ids[0])) == Counter(ids(task.first))

    async def everything(self) -> list[tuple[Any, ...]]:
        """All rows of the domain, and all that is kept of jobs."""
        return await self.stage.rows(EVERYTHING)

    async def had_progress(self, task: Task) -> bool:
        """Whether a worker that did not finish the job has committed rows of it."""
        before = (
            "SELECT count(*) FROM bulwark.chunk JOIN bulwark.job ON job.id = job_id "
            "WHERE job_id = ANY ($1) AND chunk_no > 0 AND chunk.claim_id <> job.claim_id"
        )
        return bool(await self.stage.value(before, self.jobs[task.name]))

    async def is_left_in_order(self) -> Losses:
        """What must hold of every database holds, and no worker has left a session or a lock."""
        losses = await check_invariants(self._url, seeded=self.seeded)
        assert losses.violations == []

        async def none_left() -> bool:
            left = (
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                "AND application_name LIKE 'bulwark %'"
            )
            return bool(await self.stage.value(left) == 0)

        await until(none_left, "no session of a worker is left")
        return losses


def archived(folder: Path) -> Counter[int]:
    """How often each row is in the pieces of an archive, and that there are no other pieces."""
    pieces = json.loads((folder / "manifest.json").read_text())["pieces"]
    names = {"manifest.json", *(piece["name"] for piece in pieces)}
    assert {path.name for path in folder.iterdir()} == names
    lines = [
        line
        for piece in pieces
        for line in zstd.decompress((folder / piece["name"]).read_bytes()).splitlines()
    ]
    return Counter(json.loads(line)["id"] for line in lines)
