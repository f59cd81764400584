"""Sealing and verifying: what is done to the audit behind Bulwark's back is found, and where."""

import asyncio
import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from structlog.testing import capture_logs

from db.ledger.audit import audit
from db.ledger.seal import HASHED_ROWS
from db.ledger.seal_check import Key
from jobs.maintain_ledger import MaintainLedger
from jobs.seal_audit import SealAudit
from tests.command_line import Cli, make_cli, sentence
from tests.inprocess import Bench
from tests.sealing import (
    KEY,
    OTHER_KEY,
    change_heroes,
    faults,
    rows_of,
    seal_all,
    verified,
)
from tests.stage import connected

ONE = "job_id = $1 AND chunk_no = 1 AND entry_no = $2"


@pytest.fixture
def signing(bench: Bench) -> Bench:
    """A worker that has a key."""
    bench.housekeeping = replace(bench.housekeeping, seal_keys=(KEY,))
    return bench


async def first_entry(connection: asyncpg.Connection, job_id: UUID) -> int:
    """Behind the summaries of a chunk come the lines of its rows."""
    number: int = await connection.fetchval(
        "SELECT min(entry_no) FROM bulwark.audit WHERE job_id = $1 AND chunk_no = 1", job_id
    )
    return number


# What is sealed


async def test_every_row_is_sealed_once_and_the_audit_is_whole(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await change_heroes(bench, times=3)
    await seal_all(bench, segment_rows=5)
    await change_heroes(bench, times=1)
    head = await seal_all(bench, segment_rows=5)

    found = await verified(bench)

    assert found.is_whole
    assert found.segments > 3
    assert found.findings.rows == await connection.fetchval("SELECT count(*) FROM bulwark.audit")
    assert found.findings.rows == await connection.fetchval("SELECT sum(rows) FROM bulwark.seal")
    assert found.head == head
    assert (found.unsealed, found.signed_from) == (0, None)


async def test_nothing_is_sealed_twice_and_where_nothing_happened_no_segment_is_made(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await change_heroes(bench)
    await seal_all(bench)
    before = await connection.fetch("SELECT * FROM bulwark.seal")
    row: Any = await bench.job(await bench.run(SealAudit()))
    assert row.outcome == {"segments": 0, "rows": 0, "head": None}
    assert await connection.fetch("SELECT * FROM bulwark.seal") == before


async def test_rows_of_a_transaction_that_still_runs_are_left_for_the_next_time(
    bench: Bench, connection: asyncpg.Connection, database_url: str
) -> None:
    (job_id,) = await change_heroes(bench)
    await seal_all(bench)
    async with connected(database_url) as late:
        transaction = late.transaction()
        await transaction.start()
        await late.execute(
            "INSERT INTO bulwark.audit (job_id, chunk_no, entry_no, claim_id, kind, action,"
            " table_name, rows, keys) VALUES ($1, 99, 0, $1, 'k', 'a', 't', 0, '{}')",
            job_id,
        )
        await change_heroes(bench)
        row: Any = await bench.job(await bench.run(SealAudit()))
        assert row.outcome["rows"] == 0
        assert (await verified(bench)).unsealed > 0
        await transaction.commit()

    await seal_all(bench)

    found = await verified(bench)
    assert found.is_whole
    assert found.findings.rows == await connection.fetchval("SELECT count(*) FROM bulwark.audit")


async def test_two_that_seal_at_once_make_one_chain(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await change_heroes(bench, times=4)
    accepted = [await bench.producer.enqueue(SealAudit(segment_rows=3)) for _ in range(2)]
    await asyncio.gather(*(bench.deliver(one.job_id) for one in accepted))
    for one in accepted:
        row: Any = await bench.job(one.job_id)
        assert (row.state, row.attempt) == ("succeeded", 0), row.error
    await seal_all(bench)

    found = await verified(bench)

    assert found.is_whole
    assert found.findings.rows == await connection.fetchval("SELECT count(*) FROM bulwark.audit")


async def test_a_segment_has_whole_transactions_in_blocks_of_bounded_size(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await connection.execute(
        "INSERT INTO bulwark.audit (job_id, chunk_no, entry_no, claim_id, kind, action,"
        " table_name, rows, keys) SELECT $1, 1, n, $1, 'k', 'a', 't', 0, '{}'"
        " FROM generate_series(1, 25000) AS n",
        (job_id := uuid4()),
    )
    await seal_all(bench, segment_rows=10)
    blocks = "SELECT array_agg(rows ORDER BY block_no) FROM bulwark.seal_block WHERE segment = 1"
    assert await connection.fetchval(blocks) == [10_000, 10_000, 5_000]

    await connection.execute(
        "DELETE FROM bulwark.audit WHERE job_id = $1 AND entry_no BETWEEN 9999 AND 10001", job_id
    )
    found = await verified(bench)
    assert faults(found) == [
        ("removed", 1, None, None, None, 2),
        ("removed", 1, job_id, 1, 10_001, 1),
    ]


def test_every_column_of_the_audit_is_hashed() -> None:
    row = HASHED_ROWS.split("ROW(")[1].split(")::text, 'UTF8'")[0]
    assert set(re.findall(r"\ba\.([a-z_]+)", row)) == set(audit.c.keys())


# What was done to rows


@pytest.mark.parametrize(
    "change",
    [
        "action = 'x'",
        "rows = rows + 1",
        "at = at + interval '1 microsecond'",
        "actor = 'nobody'",
        "actor = ''",
        "correlation_id = 'c'",
        "kind = kind || ' '",
        "claim_id = job_id",
        "keys = '{\"keys\": [[7]]}'",
        "before = jsonb_set(before, '{age}', '99')",
        "before = 'null'",
        "before_sensitive = NULL",
        'before_sensitive = \'{"secret_name": "another"}\'',
        "version = version + 1",
        "table_name = 'team'",
    ],
)
async def test_a_changed_row_is_found(
    bench: Bench, connection: asyncpg.Connection, change: str
) -> None:
    _, job_id = await change_heroes(bench, times=2)
    await seal_all(bench, segment_rows=4)
    entry = 1 + await first_entry(connection, job_id)
    await connection.execute(f"UPDATE bulwark.audit SET {change} WHERE {ONE}", job_id, entry)

    found = await verified(bench)

    (told,) = faults(found)
    assert (told[0], *told[2:]) == ("changed", job_id, 1, entry, 1)


async def test_a_removed_row_is_found_with_its_place(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    _, job_id = await change_heroes(bench, times=2)
    await seal_all(bench)
    entry = 2 + await first_entry(connection, job_id)
    await connection.execute(f"DELETE FROM bulwark.audit WHERE {ONE}", job_id, entry)

    found = await verified(bench)

    assert faults(found) == [("removed", 1, job_id, 1, entry, 1)]
    (fault,) = found.findings.faults
    assert f"entry {entry} was removed" in fault.detail
    assert (await verified(bench, job_id=job_id)).findings.faults == [fault]


async def test_all_rows_of_a_job_that_were_removed_are_found_between_their_neighbours(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    first, job_id, third = await change_heroes(bench, times=3)
    await seal_all(bench)
    rows = await rows_of(connection, job_id)
    await connection.execute("DELETE FROM bulwark.audit WHERE job_id = $1", job_id)

    found = await verified(bench)

    assert faults(found) == [("removed", 1, None, None, None, rows)]
    (fault,) = found.findings.faults
    assert f"behind job {first}" in fault.detail
    assert f"before job {third}" in fault.detail
    assert not (await verified(bench, job_id=job_id)).is_whole


async def test_the_last_and_the_first_row_of_a_segment_are_missed_as_well(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await change_heroes(bench, times=1)
    await seal_all(bench)
    keys = await connection.fetchrow("SELECT first_key, last_key FROM bulwark.seal_block")
    first, last = (Key.of(one) for one in keys)
    for key in (first, last):
        await connection.execute(
            "DELETE FROM bulwark.audit WHERE (job_id, chunk_no, entry_no) = ($1, $2, $3)", *key
        )

    found = await verified(bench)

    assert faults(found) == [("removed", 1, *first, 1), ("removed", 1, None, None, None, 1)]


async def test_an_inserted_row_is_found_wherever_its_transaction_is_said_to_be(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    (job_id,) = await change_heroes(bench)
    await seal_all(bench)
    copied = (
        "INSERT INTO bulwark.audit (job_id, chunk_no, entry_no, at, xid, claim_id, kind, action,"
        " table_name, rows, keys) SELECT {id}, 1, {entry}, at, {xid}, claim_id, kind, action,"
        f" table_name, rows, keys FROM bulwark.audit WHERE {ONE}"
    )
    entry = await first_entry(connection, job_id)
    aside = uuid4()  # of another month, in which nothing was sealed
    for text in (
        copied.format(id="job_id", entry=5_000, xid="xid"),
        copied.format(id=f"'{aside}'::uuid", entry=0, xid="'3'"),
        copied.format(id="job_id", entry=6_000, xid="'9000000000'"),
    ):
        await connection.execute(text, job_id, entry)

    found = await verified(bench)

    assert sorted(faults(found), key=str) == sorted(
        [
            ("inserted", 1, job_id, 1, 5_000, 1),
            ("inserted", 1, aside, 1, 0, 1),
            ("inserted", None, None, None, None, 1),
        ],
        key=str,
    )


async def test_a_row_moved_to_another_transaction_or_key_is_found(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    first, second = await change_heroes(bench, times=2)
    await seal_all(bench)
    entry = await first_entry(connection, first)
    await connection.execute(
        f"UPDATE bulwark.audit SET xid = (SELECT xid FROM bulwark.audit WHERE {ONE})"
        " WHERE job_id = $3 AND chunk_no = 1 AND entry_no = $2",
        *(second, entry, first),
    )
    assert faults(await verified(bench)) == [("changed", 1, first, 1, entry, 1)]

    await connection.execute(
        f"UPDATE bulwark.audit SET entry_no = 7777 WHERE {ONE}", second, entry + 1
    )
    kinds = {told[0] for told in faults(await verified(bench))}
    assert {"removed", "inserted"} <= kinds


# What was done to seals


async def test_a_removed_segment_is_found(bench: Bench, connection: asyncpg.Connection) -> None:
    await change_heroes(bench, times=4)
    await seal_all(bench, segment_rows=4)
    await connection.execute("DELETE FROM bulwark.seal WHERE segment = 2")
    assert faults(await verified(bench)) == [("removed_segment", 2, None, None, None, 0)]

    await connection.execute("UPDATE bulwark.seal SET segment = segment - 1 WHERE segment = 3")
    kinds = {(told[0], told[1]) for told in faults(await verified(bench))}
    assert ("forged_seal", 2) in kinds


async def test_the_last_segments_that_were_removed_are_found_by_a_head_kept_elsewhere(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await change_heroes(bench, times=4)
    head = await seal_all(bench, segment_rows=4)
    segment, kept = head.split(":")
    await connection.execute("DELETE FROM bulwark.seal WHERE segment = $1", int(segment))
    assert (await verified(bench)).is_whole
    found = await verified(bench, heads={int(segment): kept})
    assert faults(found) == [("removed_segment", int(segment), None, None, None, 0)]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE bulwark.seal SET rows = rows + 1 WHERE segment = 1",
        "UPDATE bulwark.seal SET sealed_at = sealed_at - interval '1 day' WHERE segment = 1",
        "UPDATE bulwark.seal SET hash = sha256('x') WHERE segment = 1",
        "UPDATE bulwark.seal_block SET hash = sha256('x') WHERE segment = 1",
        "UPDATE bulwark.seal_block SET marks = marks || 'x' WHERE segment = 1",
        "DELETE FROM bulwark.seal_block WHERE segment = 1",
    ],
)
async def test_an_altered_seal_is_found(
    bench: Bench, connection: asyncpg.Connection, change: str
) -> None:
    await change_heroes(bench, times=2)
    await seal_all(bench, segment_rows=4)
    await connection.execute(change)
    kinds = {(told[0], told[1]) for told in faults(await verified(bench))}
    assert ("forged_seal", 1) in kinds


async def forge(bench: Bench, connection: asyncpg.Connection, job_id: UUID) -> None:
    """Change a row, and make all seals anew, as whoever owns the tables can."""
    entry = await first_entry(connection, job_id)
    await connection.execute(f"UPDATE bulwark.audit SET actor = 'eve' WHERE {ONE}", job_id, entry)
    await connection.execute("TRUNCATE bulwark.seal, bulwark.seal_block")
    honest = bench.housekeeping
    bench.housekeeping = replace(honest, seal_keys=(OTHER_KEY,) if honest.seal_keys else ())
    await seal_all(bench)
    bench.housekeeping = honest


async def test_a_chain_made_anew_is_told_by_a_head_kept_elsewhere(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    (job_id,) = await change_heroes(bench)
    head = await seal_all(bench)
    segment, kept = head.split(":")
    assert (await verified(bench, heads={int(segment): kept})).is_whole
    await forge(bench, connection, job_id)
    assert (await verified(bench)).is_whole
    found = await verified(bench, heads={int(segment): kept})
    assert faults(found) == [("forged_head", int(segment), None, None, None, 0)]


async def test_a_chain_made_anew_without_the_key_is_told_by_its_signature(
    signing: Bench, connection: asyncpg.Connection
) -> None:
    (job_id,) = await change_heroes(signing)
    await seal_all(signing)
    found = await verified(signing)
    assert (found.is_whole, found.signed_from, found.signatures_checked) == (True, 1, True)

    await forge(signing, connection, job_id)

    assert faults(await verified(signing)) == [("forged_seal", 1, None, None, None, 0)]
    row: Any = await signing.job(await signing.run(SealAudit()))
    assert (row.state, row.reason) == ("failed", "rejected")
    assert "BULWARK_SEAL_KEY" in row.error


async def test_seals_that_were_removed_and_made_anew_by_an_honest_worker_are_found_by_a_head_alone(
    signing: Bench, connection: asyncpg.Connection, cli: Cli
) -> None:
    (job_id,) = await change_heroes(signing)
    head = await seal_all(signing)
    entry = await first_entry(connection, job_id)
    await connection.execute(f"UPDATE bulwark.audit SET actor = 'eve' WHERE {ONE}", job_id, entry)
    assert not (await verified(signing)).is_whole

    await connection.execute("TRUNCATE bulwark.seal, bulwark.seal_block")
    with capture_logs() as logs:
        await seal_all(signing)

    found = await verified(signing)
    assert (found.is_whole, found.signed_from, found.signatures_checked) == (True, 1, True)
    result = await asyncio.to_thread(cli, "audit", "verify", "--head", head, BULWARK_SEAL_KEY=KEY)
    assert result.exit_code == 5
    assert f"- forged head: segment {head.split(':')[0]}" in result.stdout
    told = [line for line in logs if line["event"] == "audit.sealed_anew"]
    assert [(line["log_level"], line["head"][:2]) for line in told] == [("warning", "1:")]


async def test_last_seals_that_an_honest_worker_made_anew_are_found_by_a_head_alone(
    signing: Bench, connection: asyncpg.Connection
) -> None:
    *_, job_id = await change_heroes(signing, times=4)
    segment, kept = (await seal_all(signing, segment_rows=4)).split(":")
    for table in ("seal", "seal_block"):
        await connection.execute(f"DELETE FROM bulwark.{table} WHERE segment > 1")
    entry = await first_entry(connection, job_id)
    await connection.execute(f"UPDATE bulwark.audit SET actor = 'eve' WHERE {ONE}", job_id, entry)
    await seal_all(signing, segment_rows=4)

    found = await verified(signing)
    assert (found.is_whole, found.signed_from, found.signatures_checked) == (True, 1, True)
    found = await verified(signing, heads={int(segment): kept})
    assert faults(found) == [("forged_head", int(segment), None, None, None, 0)]


async def test_a_first_seal_warns_of_nothing_though_jobs_before_found_nothing_to_seal(
    bench: Bench,
) -> None:
    with capture_logs() as logs:
        row: Any = await bench.job(await bench.run(SealAudit()))
        await change_heroes(bench)
        await seal_all(bench)
    assert row.outcome["segments"] == 0
    told = [line["event"] for line in logs if line["event"].startswith("audit.sealed")]
    assert told == ["audit.sealed"]


async def test_a_chain_that_lost_its_signatures_is_told(
    signing: Bench, connection: asyncpg.Connection
) -> None:
    await change_heroes(signing, times=2)
    await seal_all(signing, segment_rows=4)
    await connection.execute(
        "UPDATE bulwark.seal SET mac = NULL WHERE segment = (SELECT max(segment) FROM bulwark.seal)"
    )
    assert {told[0] for told in faults(await verified(signing))} == {"unsigned"}


async def test_a_key_that_comes_later_signs_what_there_is_and_one_that_goes_stays_known(
    bench: Bench,
) -> None:
    await change_heroes(bench)
    await seal_all(bench)
    bench.housekeeping = replace(bench.housekeeping, seal_keys=(KEY,))
    assert [told[0] for told in faults(await verified(bench))] == ["unsigned"]
    await bench.run(SealAudit())
    found = await verified(bench)
    assert (found.is_whole, found.segments, found.signed_from) == (True, 2, 2)

    bench.housekeeping = replace(bench.housekeeping, seal_keys=(OTHER_KEY, KEY))
    await change_heroes(bench)
    await seal_all(bench)
    assert (await verified(bench)).is_whole
    assert not (await verified(bench, keys=[OTHER_KEY])).is_whole


async def test_a_server_that_counts_behind_the_seals_is_told_and_not_sealed_on(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await change_heroes(bench)
    await seal_all(bench)
    await connection.execute("UPDATE bulwark.seal SET below_xid = '9000000000'")
    assert "counter_behind" in {told[0] for told in faults(await verified(bench))}
    row: Any = await bench.job(await bench.run(SealAudit()))
    assert "another cluster" in row.error


# What leaves lawfully


async def old_months(connection: asyncpg.Connection) -> dict[str, UUID]:
    """Two months long ago with ten lines of the audit each, one of them in no partition."""
    made = {}
    for days, has_partition in ((400, True), (800, False)):
        at = datetime.now(UTC) - timedelta(days=days)
        job_id = UUID(f"{round(at.timestamp() * 1000):012x}7000800000000000{uuid4().hex[:4]}")
        month = f"{at:%Y_%m}"
        if has_partition:
            low = at.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
            high = (low + timedelta(days=32)).replace(day=1)
            await connection.execute(
                f"CREATE TABLE bulwark.audit_{month} PARTITION OF bulwark.audit"
                f" FOR VALUES FROM (bulwark.uuid_floor('{low}')) TO (bulwark.uuid_floor('{high}'))"
            )
        await connection.execute(
            "INSERT INTO bulwark.audit (job_id, chunk_no, entry_no, claim_id, kind, action,"
            " table_name, rows, keys) SELECT $1, 1, n, $1, 'k', 'a', 't', 0, '{}'"
            " FROM generate_series(1, 10) AS n",
            job_id,
        )
        made[month] = job_id
    return made


async def test_months_that_are_rotated_are_no_fault_and_are_told(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    months = await old_months(connection)
    await change_heroes(bench)
    await seal_all(bench)
    rows = (await verified(bench)).findings.rows

    await bench.run(MaintainLedger(retention_days={"audit": 100}))

    found = await verified(bench)
    assert found.is_whole
    assert (found.findings.rows, found.findings.rotated) == (rows - 20, 20)
    assert {f"{one['month']:%Y_%m}" for one in found.rotations} == set(months)
    await seal_all(bench)
    assert (await verified(bench)).is_whole


async def test_a_month_that_goes_without_the_function_is_a_fault(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    (month, job_id), _ = (await old_months(connection)).items()
    await seal_all(bench)
    await connection.execute(f"DROP TABLE bulwark.audit_{month}")
    assert faults(await verified(bench)) == [("removed", 1, job_id, 1, 1, 10)]


async def test_a_rotation_that_was_recorded_later_into_a_sealed_segment_is_a_fault(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    (month, _), _ = (await old_months(connection)).items()
    await seal_all(bench)
    await connection.execute(f"DROP TABLE bulwark.audit_{month}")
    await connection.execute(
        "INSERT INTO bulwark.rotation (month, xid) SELECT to_date($1, 'YYYY_MM'), xid"
        " FROM bulwark.audit LIMIT 1",
        month,
    )
    assert [told[0] for told in faults(await verified(bench))] == ["forged_rotation"]


async def test_a_rotated_month_hides_no_changed_and_no_inserted_row(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    months = await old_months(connection)
    await seal_all(bench)
    (job_id,) = [one for month, one in months.items() if month == min(months)]
    await connection.execute("SELECT bulwark.drop_strays('audit', now() - interval '1 day', 4)")
    left = await connection.fetchval(
        "SELECT max(entry_no) FROM bulwark.audit WHERE job_id = $1", job_id
    )
    assert (await verified(bench)).is_whole
    await connection.execute(f"UPDATE bulwark.audit SET actor = 'eve' WHERE {ONE}", job_id, left)
    (told,) = faults(await verified(bench))
    assert told[2:5] == (job_id, 1, left)


# How it is told


async def test_a_sealed_segment_is_told_with_its_head_and_without_the_key(signing: Bench) -> None:
    await change_heroes(signing)
    with capture_logs() as logs:
        head = await seal_all(signing)
    told = [line for line in logs if line["event"] == "audit.sealed"]
    assert told[-1]["head"] == head
    assert told[-1]["signed"] is True
    assert KEY not in repr(logs) + repr(signing.housekeeping)


@pytest.fixture
def cli(database_url: str) -> Cli:
    return make_cli(database_url, None)


async def test_verifying_ends_with_0_when_the_audit_is_whole_and_with_5_when_not(
    bench: Bench, connection: asyncpg.Connection, cli: Cli
) -> None:
    (job_id,) = await change_heroes(bench)
    head = await seal_all(bench)

    result = await asyncio.to_thread(cli, "audit", "verify", "--head", head)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == "whole"
    assert head in result.stdout

    entry = 1 + await first_entry(connection, job_id)
    await connection.execute(f"DELETE FROM bulwark.audit WHERE {ONE}", job_id, entry)
    result = await asyncio.to_thread(cli, "audit", "verify")
    assert result.exit_code == 5
    assert f"- removed: segment 1: job {job_id} chunk 1 entry {entry} was removed" in result.stdout

    result = await asyncio.to_thread(cli, "audit", "verify", "--json", "--job", str(job_id))
    assert result.exit_code == 5
    document = json.loads(result.stdout)
    assert " ".join(document) == (
        "whole segments head signed_from signatures_checked rows rotated_rows unsealed_rows "
        "rotations faults untold_faults"
    )
    (fault,) = document["faults"]
    assert {name: fault[name] for name in ("kind", "segment", "job_id", "chunk", "entry")} == {
        "kind": "removed",
        "segment": 1,
        "job_id": str(job_id),
        "chunk": 1,
        "entry": entry,
    }


@pytest.mark.parametrize("head", ["7", "0:" + "a" * 64, "1:xyz", "1:" + "a" * 63])
def test_a_head_that_is_none_is_refused_in_one_sentence(cli: Cli, head: str) -> None:
    result = cli("audit", "verify", "--head", head)
    assert result.exit_code == 2
    assert "is no SEGMENT:HASH" in sentence(result)


def test_a_short_key_is_refused_without_being_repeated(cli: Cli) -> None:
    result = cli("audit", "verify", BULWARK_SEAL_KEY="short-and-secret")
    assert result.exit_code == 4
    assert "BULWARK_SEAL_KEY: a key has fewer than 32 signs" in (said := sentence(result))
    assert "short-and-secret" not in said
