"""The check that the chaos tests end with sees each way in which the books could be wrong."""

import asyncpg
import pytest

from jobs.insert_rows import InsertRows
from jobs.restore_rows import RestoreRows
from jobs.soft_delete_rows import SoftDeleteRows
from jobs.swap_heroes import SwapHeroes
from jobs.transfer_heroes import TransferHeroes
from jobs.transfer_window import TransferWindow
from jobs.update_rows import UpdateRows
from tests.inprocess import Bench
from tests.invariants import Losses, check_invariants
from tests.sample_jobs.write_notes import WriteNotes
from tests.stage import Stage, connected

PAYLOADS = [
    InsertRows(table="team", rows=[{"name": f"Team {n}"} for n in range(4)]),
    InsertRows(table="team", rows=[{"name": "Team 1"}, {"name": "Team 4"}, {}]),
    InsertRows(
        table="hero",
        chunk_rows=2,
        where={"age": "9"},
        rows=[{"name": f"H{n}", "external_id": f"x{n}", "age": 9 - n // 6} for n in range(7)],
    ),
    InsertRows(
        table="hero",
        on_conflict="update",
        map={"club": "team.name"},
        on_missing="create",
        rows=[{"name": "New", "external_id": f"x{n}", "club": "Made"} for n in range(4, 8)],
    ),
    UpdateRows(table="hero", keys=[1, 2, 99], values={"age": 7}),
    SoftDeleteRows(table="hero", keys=[1, 2]),
    RestoreRows(table="hero", keys=[1, 2]),
    TransferHeroes(hero_ids=[1, 2], to_team_id=1),
    TransferHeroes(hero_ids=[1], from_team_id=2, to_team_id=3),
    TransferHeroes(hero_ids=[3], to_team_id=2),
    SwapHeroes(team_a_id=1, hero_ids_a=[1], team_b_id=2, hero_ids_b=[3]),
    TransferWindow(rows=[{"hero_id": 1, "from_team_id": 2, "to_team_id": n} for n in (1, 3)]),
    WriteNotes(chunks=2),
    InsertRows(table="team", rows=[{"name": "Team 1"}], max_rejects=0),
]

WROTE_MORE = """
    INSERT INTO bulwark.audit
           (job_id, chunk_no, entry_no, claim_id, kind, action, table_name, rows, keys)
    SELECT id, {chunk_no}, 99, claim_id, kind, 'update', 'membership', 1, '{{}}'
      FROM bulwark.job WHERE kind = '{kind}' AND state = '{state}'
"""
NO_MEMBERSHIP_CHANGED = "has changed 0 rows of membership, and the audit has 1"
WAS_CANCELLED = """
    SET session_replication_role = replica;
    UPDATE bulwark.job SET state = 'cancelled' WHERE kind = 'swap_heroes'
"""
"""No trigger keeps it from that."""
SAYS_NOTHING = """
    SET session_replication_role = replica;
    UPDATE bulwark.job SET state = 'cancelled', outcome = NULL WHERE kind = 'restore_rows'
"""
UNJUDGED = """
    UPDATE bulwark.chunk SET detail = jsonb_set(detail, '{text_bytes}', '1000000')
     WHERE chunk_no = 0 AND job_id IN (
         SELECT id FROM bulwark.job WHERE kind = 'insert_rows' AND state = 'failed')
"""


@pytest.fixture
async def books(bench: Bench, stage: Stage) -> None:
    """What jobs of each kind leave behind."""
    for payload in PAYLOADS:
        await bench.run(payload)


@pytest.mark.usefixtures("books")
async def test_nothing_is_wrong_where_nothing_went_wrong(
    database_url: str, connection: asyncpg.Connection
) -> None:
    assert await check_invariants(database_url) == Losses()
    states = await connection.fetch("SELECT state, count(*) FROM bulwark.job GROUP BY 1 ORDER BY 1")
    assert [tuple(row) for row in states] == [("failed", 2), ("succeeded", len(PAYLOADS) - 2)]


@pytest.mark.usefixtures("books")
@pytest.mark.parametrize(
    ("wrong", "lost", "doubled", "told"),
    [
        ("DELETE FROM hero WHERE id = 4", 1, 0, "inserted 2 rows into hero, and 1 are there"),
        ("INSERT INTO hero (name) VALUES ('H')", 0, 1, "9 rows of hero are by jobs"),
        ("DELETE FROM transfer WHERE id = 4", 2, 0, "no way to where he is"),
        ("UPDATE hero SET team_id = 3 WHERE id = 3", 1, 0, "hero 3"),
        ("DELETE FROM bulwark.audit WHERE action = 'delete'", 2, 0, "the audit has 0"),
        (
            "DELETE FROM bulwark.audit WHERE action = 'move' AND kind = 'transfer_window'",
            1,
            0,
            "has changed 1 rows of hero, and the audit has 0",
        ),
        (
            "DELETE FROM bulwark.audit WHERE action = 'move' AND kind = 'transfer_heroes'",
            3,
            0,
            "has changed 2 rows of hero, and the audit has 0",
        ),
        (
            WROTE_MORE.format(kind="transfer_heroes", state="failed", chunk_no=0),
            0,
            1,
            NO_MEMBERSHIP_CHANGED,
        ),
        (
            WROTE_MORE.format(kind="insert_rows", state="failed", chunk_no=2),
            0,
            1,
            NO_MEMBERSHIP_CHANGED,
        ),
        (
            WROTE_MORE.format(kind="update_rows", state="succeeded", chunk_no=1),
            0,
            1,
            NO_MEMBERSHIP_CHANGED,
        ),
        (SAYS_NOTHING, 0, 0, 'and its receipts say {"restored": 2} of 2 rows'),
        (WAS_CANCELLED, 0, 4, "has changed 0 rows of hero, and the audit has 2"),
        (
            (
                "UPDATE bulwark.job SET payload = payload - 'on_missing' "
                "WHERE payload ->> 'on_missing' = 'create'"
            ),
            0,
            1,
            "has changed 0 rows of team, and the audit has 1",
        ),
        (
            "UPDATE bulwark.audit SET claim_id = job_id WHERE kind = 'swap_heroes'",
            0,
            1,
            "of another",
        ),
        ("DELETE FROM bulwark.verdict WHERE verdict = 'missing'", 1, 0, "0 are recorded"),
        (UNJUDGED, 1, 0, "its receipts end at byte"),
        (
            (
                "UPDATE bulwark.chunk SET counts = '{\"inserted\": 3}' "
                "WHERE rows = 4 AND counts = '{\"inserted\": 4}'"
            ),
            1,
            1,
            "has 4 rows and 3 verdicts",
        ),
        (
            (
                "DELETE FROM bulwark.chunk WHERE chunk_no = 2 AND job_id IN "
                "(SELECT id FROM bulwark.job WHERE kind = 'insert_rows')"
            ),
            2,
            2,
            "the next begins with row 5",
        ),
        (
            (
                "UPDATE bulwark.job SET outcome = jsonb_set(outcome, '{rows}', '5') "
                "WHERE kind = 'update_rows'"
            ),
            0,
            0,
            "of 3 rows",
        ),
        (
            (
                "INSERT INTO bulwark.job (id, kind, payload, max_attempts, timeout_s) "
                "VALUES (gen_random_uuid(), 'act_out', '{}', 1, 1)"
            ),
            1,
            0,
            "is still queued",
        ),
        (
            (
                "INSERT INTO bulwark.progress (job_id, claim_id, rows, bytes) "
                "SELECT id, claim_id, 1, 1 FROM bulwark.job LIMIT 1"
            ),
            0,
            0,
            "tells progress",
        ),
    ],
)
async def test_each_wrong_is_seen(
    database_url: str,
    connection: asyncpg.Connection,
    wrong: str,
    lost: int,
    doubled: int,
    told: str,
) -> None:
    assert int((await connection.execute(wrong)).split()[-1]) > 0
    losses = await check_invariants(database_url)
    assert any(told in one for one in losses.violations), losses
    assert (losses.lost, losses.doubled) == (lost, doubled), losses


@pytest.mark.usefixtures("books")
async def test_a_session_of_a_worker_that_has_ended_is_seen(
    database_url: str, connection: asyncpg.Connection
) -> None:
    ended = await connection.fetchval(
        "INSERT INTO bulwark.worker (id, host, pid, queues, ended_at) "
        "VALUES (gen_random_uuid(), 'here', 1, '{}', now()) RETURNING id"
    )
    async with connected(database_url) as left:
        await left.execute(f"SET application_name = 'bulwark {ended}'")
        await left.execute("BEGIN; LOCK TABLE team IN SHARE MODE")
        (told,) = (await check_invariants(database_url)).violations
        assert "idle in transaction" in told
    assert not await check_invariants(database_url)


async def test_rows_that_the_test_has_written_are_told_from_those_of_jobs(
    database_url: str, connection: asyncpg.Connection, bench: Bench
) -> None:
    await connection.execute("INSERT INTO team (name) VALUES ('Seeded')")
    await bench.run(InsertRows(table="team", rows=[{"name": "Team"}]))
    assert await check_invariants(database_url)
    assert not await check_invariants(database_url, seeded={"team": 1})
