"""Staged rows and the rows of a table that they concern: noted, locked, and updated as a set."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from sqlalchemy.ext.asyncio import AsyncSession

from db.batch import Batch
from db.catalog import TableFacts, quote
from db.errors import Race
from db.ledger.audit import Journal
from db.merging import Given
from db.overwriting import GIVEN, MATCH, Overwriting
from db.refusal import OUTDATED, Refusal, RowFault
from db.staging import ROW_NO, STAGE, Stage, orphaned

LOCK_TRIES = 20
MANY_ROUNDS = 20
ROUND = "bulwark_round"
EXPECTED = "bulwark_expected"


class MatchStage(Stage):
    """A staging table whose rows concern rows of the table that are there."""

    def __init__(
        self,
        session: AsyncSession,
        facts: TableFacts,
        columns: tuple[str, ...],
        given: Given,
        journal: Journal,
        sensitive: frozenset[str],
    ) -> None:
        super().__init__(session, facts, columns)
        self._given = given
        self._journal = journal
        self._kinds = given.kinds()
        self._sql = Overwriting(facts, columns, self._kinds, sensitive)

    @property
    def _key(self) -> tuple[str, ...]:
        return self._facts.primary_key

    async def create(self) -> None:
        """Make the tables; and tell the planner that the pages it will look up are in memory.

        Every page is visited several times; read in full, a large table would be so each time.
        """
        await super().create()
        await self._run("SELECT set_config('random_page_cost', '0.1', true)")
        await self._run(f"DROP TABLE IF EXISTS pg_temp.{MATCH}")
        await self._run(
            f"CREATE TEMPORARY TABLE {MATCH} ON COMMIT DROP AS SELECT 0 AS row_no, "
            f"{self._sql.picked('t')} FROM {self._facts.name} AS t WITH NO DATA"
        )
        await self._run(
            f"ALTER TABLE {STAGE} ADD {ROUND} int NOT NULL DEFAULT 0, "
            f"ADD {GIVEN} int NOT NULL DEFAULT 0, ADD {EXPECTED} bigint"
        )

    async def fill(self, batch: Batch) -> None:
        """COPY the rows in, with what each gives and expects where that is not the same for all."""
        self._count = len(batch)
        await self.load_all(batch)
        numbers = {given: number for number, given in enumerate(self._kinds)}
        uneven = {row: numbers[given] for row, given in self._given.uneven.items()}
        await self._set(GIVEN, uneven)
        await self._set(EXPECTED, self._given.expected)
        await self._measure()

    async def look(self) -> None:
        """Find out what the rows meet, without a lock on it, and the rounds in which they go."""
        await self._match()
        self._rounds = await self.make_rounds()

    @abstractmethod
    async def make_rounds(self) -> list[list[int]]:
        """The rows in rounds, so that what one round makes does not matter to the rest of it."""

    @abstractmethod
    async def _apply(self) -> None:
        """Let the rows in scope take effect, none of which has to do with another."""

    async def _before_rounds(self) -> None:
        """Do what has to be done before any row of several rounds takes effect."""

    async def apply_in_rounds(self) -> None:
        """Apply all rows, those that have nothing to do with each other at once."""
        if not await self.lock():
            self._rounds = await self.make_rounds()
        if len(self._rounds) == 1:
            await self._apply()
            return
        await self._before_rounds()
        await self._set(ROUND, {row: n for n, rows in enumerate(self._rounds) if n for row in rows})
        if len(self._rounds) > MANY_ROUNDS:
            await self._run(f"CREATE INDEX ON {STAGE} ({ROUND})")
            await self._run(f"CREATE INDEX ON {STAGE} ({ROW_NO})")
        for number, rows in enumerate(self._rounds):
            with self._narrowed(f"{ROUND} = :round", frozenset(rows), round=number):
                await self._run(f"TRUNCATE {MATCH}")
                await self._match()
                await self.lock()
                await self._apply()

    @abstractmethod
    async def _match(self) -> None:
        """Note in MATCH which rows of the table the rows in scope concern."""

    async def lock(self) -> bool:
        """Lock what the rows in scope meet, in the order of its keys; whether it was as noted.

        What others changed since it was looked up is looked up again, under the locks on the rest.
        """
        for attempt in range(LOCK_TRIES):
            changed = await self._lock_met()
            if not changed:
                return attempt == 0
            await self._run(f"DELETE FROM {MATCH} WHERE row_no = ANY(:rows)", rows=changed)
            with self._narrowed(f"{ROW_NO} = ANY(:changed)", changed=changed):
                await self._match()
        raise Race

    async def _lock_met(self) -> list[int]:
        """Lock what is noted; returns the staged rows of which it is not what is there any more.

        What was changed meanwhile is locked in its turn, too, being found by its key: locked later,
        it could close a circle. OFFSET 0 makes it a look-up for each row, in that order.
        """
        version = ["place", "born", *self._sql.keys]
        keys = ", ".join(self._sql.keys)
        own = zip(self._key, self._sql.keys, strict=True)
        same = " AND ".join(f"o.{quote(name)} = m.{key}" for name, key in own)
        noted = f"(SELECT DISTINCT {', '.join(version)} FROM {MATCH} ORDER BY {keys})"
        locked = " AND ".join(f"h.{name} = m.{name}" for name in version)
        return await self._numbers(
            f"WITH held AS MATERIALIZED (SELECT m.*, t.* FROM {noted} AS m CROSS JOIN LATERAL "
            f"(SELECT o.ctid AS now, o.xmin AS version FROM {self._facts.name} AS o "
            f"WHERE {same} OFFSET 0 FOR NO KEY UPDATE) AS t) "
            f"SELECT DISTINCT row_no FROM {MATCH} AS m WHERE NOT EXISTS (SELECT FROM held AS h "
            f"WHERE {locked} AND h.now = h.place AND h.version = h.born)"
        )

    async def _keep_best_matches(self) -> None:
        """Of what a row meets, leave the live row, else the one that was deleted last."""
        latest = ", ".join(f"{key} DESC" for key in self._sql.keys)
        await self._run(
            f"DELETE FROM {MATCH} AS m USING (SELECT row_no, place, deleted_at, "
            "bool_or(deleted_at IS NULL) OVER (PARTITION BY row_no) AS alive, "
            f"row_number() OVER (PARTITION BY row_no ORDER BY deleted_at DESC, {latest}) AS rank "
            f"FROM {MATCH}) AS r WHERE m.row_no = r.row_no AND m.place = r.place "
            "AND r.deleted_at IS NOT NULL AND (r.alive OR r.rank > 1)"
        )

    async def _refuse_outdated(self) -> set[int]:
        text = "the row that is there has not the version that was expected; read it again"
        expected = f"SELECT {ROW_NO} FROM {STAGE} AS s WHERE {EXPECTED} IS NOT NULL"
        refused = await self._put_aside(
            f"EXISTS (SELECT FROM {STAGE} AS s, {self._facts.name} AS t "
            f"WHERE s.{ROW_NO} = m.row_no AND {self._sql.same_row_as_met('t', 'm')} "
            f"AND s.{EXPECTED} <> t.version)",
            Refusal(OUTDATED, text, "version"),
        )
        gone = f"{expected}{self._scope_sql} AND {ROW_NO} NOT IN (SELECT row_no FROM {MATCH})"
        refusal = Refusal(OUTDATED, "a row of that version was expected and none is there")
        for number in await self._numbers(gone):
            self._refused.setdefault(number, refusal)
            self._loaded.discard(number)
        await self._hold(self._refused.keys())
        return refused

    async def _put_aside(self, condition: str, refusal: Refusal) -> set[int]:
        """Refuse the rows whose match fulfils a condition, and take their matches out."""
        gone = await self._run(f"DELETE FROM {MATCH} AS m WHERE {condition} RETURNING row_no")
        told = set(gone.scalars())
        rows = told & self._loaded
        if rows:
            self._refused.update(dict.fromkeys(rows, refusal))
            self._loaded -= rows
            await self._hold(rows)
        return told

    async def _classify_written(self, written: Collection[str], met: str) -> None:
        """Refuse the rows whose values alone break a constraint, in PostgreSQL's order.

        `written` are the columns that every row of which the SQL `met` is true writes.
        """
        for column in self._facts.columns:
            if column.not_null and column.name in written:
                condition = f"{met} AND {quote(column.name)} IS NULL"
                await self._refuse(condition, "not_null_violation", None, column.name)
        for check in self._facts.checks:
            if set(written).issuperset(check.columns):
                condition = f"{met} AND ({check.expression}) IS FALSE"
                await self._refuse(condition, "check_violation", check.name)
        for key in self._facts.foreign_keys:
            if set(written).issuperset(key.columns):
                condition = f"{met} AND {orphaned(key)}"
                await self._refuse(condition, "foreign_key_violation", key.name)
        await self._hold(self._refused.keys())

    async def _update_halving(self, span: tuple[int, int] | None) -> None:
        """Update what the rows meet; those that PostgreSQL refuses are found by halving."""
        fault = await self._update_all(span)
        if fault is None:
            return
        first, end = span or (0, self._count)
        if end - first == 1:
            self._settle(first, fault.refusal(self._facts))
            return
        middle = (first + end) // 2
        await self._update_halving((first, middle))
        await self._update_halving((middle, end))

    @abstractmethod
    async def _update_all(self, span: tuple[int, int] | None) -> RowFault | None:
        """Update what the rows of a span concern; or do nothing, and return the fault."""

    async def _noting(self, sql: str, action: str) -> list[int]:
        """Run an UPDATE, writing into the audit what it changes; returns the rows that did."""
        noted, binds = self._journal.sql("changed", action)
        told = await self._run(
            f"WITH changed AS ({sql}), noted AS ({noted}) SELECT array_agg(row_no) FROM changed",
            **binds,
        )
        return told.scalar_one() or []

    async def _meeting_the_same(self) -> list[list[int]]:
        """Staged rows that meet the same row."""
        rows = await self._run(
            f"SELECT array_agg(DISTINCT row_no) FROM {MATCH} GROUP BY {', '.join(self._sql.keys)} "
            "HAVING count(DISTINCT row_no) > 1"
        )
        return list(rows.scalars())


def in_turn(rows: Iterable[int], groups: Iterable[Sequence[int]]) -> list[tuple[int, int]]:
    """Each row with its place among the rows that it is connected with by the groups."""
    parent: dict[int, int] = {}

    def root(row: int) -> int:
        while (above := parent.get(row, row)) != row:
            parent[row] = row = parent.get(above, above)
        return row

    for first, *others in groups:
        for other in others:
            parent[root(other)] = root(first)
    turns: dict[int, int] = defaultdict(int)
    numbered = []
    for row in rows:
        numbered.append((turns[root(row)], row))
        turns[root(row)] += 1
    return numbered
