"""docs/permissions.md: under its roles all that has to works, and nothing else does."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from db.engine import make_sessions
from jobs import discover_jobs
from jobs._declaration import Payload
from jobs._errors import IdempotencyConflict
from jobs._housekeeping import Housekeeping
from jobs._producer import Producer
from jobs._spooling import enqueue_file
from jobs.insert_rows import InsertRows
from jobs.maintain_ledger import MaintainLedger
from jobs.purge_deleted_rows import PurgeDeletedRows
from jobs.restore_archive import RestoreArchive
from jobs.restore_rows import RestoreRows
from jobs.soft_delete_rows import SoftDeleteRows
from jobs.swap_heroes import SwapHeroes
from jobs.transfer_heroes import TransferHeroes
from jobs.transfer_window import TransferWindow
from jobs.update_rows import UpdateRows
from tests.command_line import Cli, make_cli, sentence
from tests.inprocess import Bench
from tests.roles import House, house, refused
from tests.sample_jobs.act_out import ActOut
from tests.sealing import KEY, seal_all
from tests.stage import SAMPLE_JOBS, Stage, connected
from tests.workers import Start, environment, until

QUICK = {
    "job_modules": ",".join(SAMPLE_JOBS),
    "beat_interval_s": "0.3",
    "lost_after_s": "1.0",
    "relay_interval_s": "0.1",
    "log_format": "json",
}


@pytest.fixture(scope="module")
def roles() -> Iterator[House]:
    with house() as built:
        yield built


@dataclass
class Staff:
    """A producer and a worker, each in its role, and a look at everything as the superuser."""

    roles: House
    producer: Producer
    bench: Bench

    async def done(self, payload: Payload) -> tuple[UUID, dict[str, Any]]:
        """Enqueue in the one role, carry out in the other; the job must succeed."""
        accepted = await self.producer.enqueue(payload, idempotency_key=str(uuid4()))
        return accepted.job_id, await self.outcome(accepted.job_id)

    async def outcome(self, job_id: UUID) -> dict[str, Any]:
        await self.bench.deliver(job_id)
        row: Any = await self.bench.job(job_id)
        assert row.state == "succeeded", row.error
        return dict(row.outcome or {})

    async def value(self, sql: str, *arguments: object) -> Any:
        async with connected(self.roles.superuser_url) as connection:
            return await connection.fetchval(sql, *arguments)


@pytest.fixture
async def staff(roles: House, tmp_path: Path) -> AsyncIterator[Staff]:
    jobs = discover_jobs(SAMPLE_JOBS)
    producers = create_async_engine(roles.url("producer"))
    workers = create_async_engine(roles.url("worker"))
    bench = Bench(make_sessions(workers), roles.url("worker"), jobs)
    bench.housekeeping = Housekeeping(
        {"hero": 0, "team": 0, "membership": 0, "transfer": 0}, {}, [tmp_path], (KEY,)
    )
    yield Staff(roles, Producer(make_sessions(producers), jobs), bench)
    await producers.dispose()
    await workers.dispose()


def cli_as(roles: House, role: str, **settings: str) -> Cli:
    return make_cli(roles.url(role), None, **settings)


# What has to work


async def test_all_kinds_of_work_are_done_in_the_workers_role(staff: Staff, tmp_path: Path) -> None:
    file = tmp_path / "heroes.csv"
    file.write_text("external_id,name,age,secret_name\na,Ann,20,x\nb,Bob,21,y\nb,Bad,1,z\n")
    teams: list[Any] = [{"name": name, "roster_limit": 9} for name in ("Red", "Blue")]
    await staff.done(InsertRows(table="team", rows=teams))
    accepted = await enqueue_file(staff.producer, file, {"table": "hero"})
    assert (await staff.outcome(accepted.job_id))["verdicts"] == {"inserted": 2, "rejected": 1}
    rows: list[Any] = [{"external_id": "a", "name": "Anne"}, {"external_id": "c", "name": "Cid"}]
    await staff.done(InsertRows(table="hero", rows=rows, on_conflict="update"))
    ann, bob, cid = [
        await staff.value("SELECT id FROM hero WHERE external_id = $1", name) for name in "abc"
    ]
    red, blue = [
        await staff.value("SELECT id FROM team WHERE name = $1", name) for name in ("Red", "Blue")
    ]

    told = [
        await staff.done(UpdateRows(table="hero", keys=[ann, bob], values={"age": 33})),
        await staff.done(SoftDeleteRows(table="hero", keys=[bob])),
        await staff.done(RestoreRows(table="hero", keys=[bob])),
        await staff.done(TransferHeroes(hero_ids=[ann, bob], to_team_id=red)),
        await staff.done(TransferHeroes(hero_ids=[cid], to_team_id=blue)),
        await staff.done(
            SwapHeroes(team_a_id=red, hero_ids_a=[ann], team_b_id=blue, hero_ids_b=[cid])
        ),
        await staff.done(
            TransferWindow(rows=[{"hero_id": bob, "from_team_id": red, "to_team_id": None}])
        ),
    ]
    assert [one[1].get("verdicts") for one in told] == [
        {"updated": 2},
        {"deleted": 1},
        {"restored": 1},
        {"moved": 2},
        {"moved": 1},
        {"moved": 2},
        {"moved": 1},
    ]

    await staff.done(InsertRows(table="hero", rows=[{"name": "Old", "external_id": "o"}]))
    old = await staff.value("SELECT id FROM hero WHERE external_id = 'o'")
    await staff.done(SoftDeleteRows(table="hero", keys=[old]))
    _, purged = await staff.done(PurgeDeletedRows(archive=str(tmp_path), dry_run=False))
    assert purged["verdicts"] == {"purged": 1}
    _, restored = await staff.done(RestoreArchive(archive=purged["archive"]))
    assert restored["verdicts"] == {"inserted": 1}
    await staff.done(PurgeDeletedRows(dry_run=True))


async def test_the_ledger_is_maintained_and_the_audit_sealed_and_verified(
    staff: Staff, roles: House
) -> None:
    await staff.done(InsertRows(table="team", rows=[{"name": "Sealed"}]))
    await staff.value(
        "CREATE TABLE bulwark.audit_2020_01 PARTITION OF bulwark.audit"
        " FOR VALUES FROM (bulwark.uuid_floor('2020-01-01+00'))"
        " TO (bulwark.uuid_floor('2020-02-01+00'))"
    )
    await staff.value("ALTER TABLE bulwark.audit_2020_01 OWNER TO bulwark_owner")
    days: Any = dict.fromkeys(("chunk", "verdict", "audit", "spool", "job", "parked"), 300)
    _, outcome = await staff.done(MaintainLedger(retention_days=days))
    assert outcome["audit"]["dropped"] == ["audit_2020_01"]
    assert await staff.value("SELECT role FROM bulwark.rotation") == "bulwark_worker"

    head = await seal_all(staff.bench)

    cli = cli_as(roles, "auditor", seal_key=KEY)
    result = await asyncio.to_thread(cli, "audit", "verify", "--head", head, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["whole"], document["signatures_checked"]) == (True, True)
    assert [one["role"] for one in document["rotations"]] == ["bulwark_worker"]


async def test_jobs_of_a_killed_worker_are_taken_back_and_schedules_fired(
    staff: Staff, roles: House, start: Start, redis_url: str
) -> None:
    slots = {"audit_sealing": {"cron": "* * * * * *"}}
    patient = {"redis_timeout_s": "30"}  # a Redis that is slow for a moment has not failed
    settings = {**QUICK, **patient, "schedules": json.dumps(slots)}
    env = environment(roles.url("worker"), redis_url, **settings)
    async with connected(roles.superuser_url) as connection:
        stage = Stage(connection)
        await stage.close_gate()
        first = start(env)
        job_id = (await staff.producer.enqueue(ActOut(gate=True, note="rescued"))).job_id
        await stage.somebody_at_gate()
        first.kill()
        second = start(env)

        async def rescued() -> bool:
            return bool((await stage.row(job_id))["crashes"] == 1)

        await until(rescued, "the killed worker's job is taken back")
        await stage.open_gate()
        await stage.becomes(job_id, "succeeded")
        assert await stage.value("SELECT count(*) FROM note WHERE text = 'rescued'") == 1

        async def fired() -> bool:
            query = "SELECT count(*) FROM bulwark.slot WHERE outcome = 'fired'"
            return bool(await stage.value(query))

        await until(fired, "a slot is fired")
        assert second.terminate() == 0
    told = second.told()
    assert "job.rescued" in told
    assert not {name for name in told if name.endswith((".failed", ".not_tidied"))}


async def test_the_commands_that_read_work_in_the_readers_role(
    staff: Staff, roles: House, tmp_path: Path
) -> None:
    rows: list[Any] = [
        {"name": "Canary", "secret_name": "canary-1", "external_id": "r1"},
        {"name": "Canary", "secret_name": "canary-2", "external_id": "r1"},
    ]
    job_id, _ = await staff.done(InsertRows(table="hero", rows=rows))
    hero = await staff.value("SELECT id FROM hero WHERE external_id = 'r1'")
    await staff.done(UpdateRows(table="hero", keys=[hero], values={"secret_name": "canary-3"}))
    cli = cli_as(roles, "reader")
    shown = ""
    for words in (
        ("jobs",),
        ("job", str(job_id)),
        ("rejects", str(job_id)),
        ("audit",),
        ("audit", "export"),
        ("list", "hero"),
        ("list", "team"),
        ("show", "hero", str(hero)),
        ("schedule",),
        ("failed",),
        ("limit",),
    ):
        for how in ((), ("--json",)) if words != ("audit", "export") else ((),):
            result = await asyncio.to_thread(cli, *words, *how)
            assert result.exit_code == 0, (words, result.output)
            shown += result.output
    assert str(job_id) in shown
    assert "unique_violation" in shown or "external_id" in shown
    assert "canary" not in shown

    document = json.loads((await asyncio.to_thread(cli, "job", str(job_id), "--json")).stdout)
    assert (document["table_name"], document["adds_up"]) == ("hero", True)


async def test_an_operator_imports_cancels_limits_and_runs_failed_jobs_again(
    staff: Staff, roles: House, tmp_path: Path
) -> None:
    cli = cli_as(roles, "operator", job_modules=",".join(SAMPLE_JOBS))

    async def said(*words: str) -> str:
        result = await asyncio.to_thread(cli, *words)
        assert result.exit_code == 0, (words, result.output)
        return result.stdout

    (tmp_path / "team.csv").write_text("name\nOperated\n")
    accepted = json.loads(await said("import", "team", str(tmp_path / "team.csv"), "--json"))
    await staff.outcome(UUID(accepted["job_id"]))

    failing = (await staff.producer.enqueue(ActOut(then="reject"))).job_id
    await staff.bench.deliver(failing)
    assert str(failing) in await said("failed", "--json")
    await said("retry", str(failing))
    row: Any = await staff.bench.job(failing)
    assert row.state == "queued"
    await said("cancel", str(failing))
    row = await staff.bench.job(failing)
    assert row.state == "cancelled"
    await said("limit", "default", "--most", "100000")
    await staff.producer.enqueue(ActOut())
    await said("limit", "default", "--none")
    await said("parked")


async def test_a_producer_enqueues_from_sql_and_reads_no_payload_to_judge_a_key(
    staff: Staff, roles: House
) -> None:
    key, sql = str(uuid4()), "SELECT bulwark.enqueue('act_out', $1, $2)"
    async with connected(roles.url("producer")) as producer:
        job_id = await producer.fetchval(sql, '{"note": "from sql"}', key)
        assert await producer.fetchval(sql, '{"note": "from sql"}', key) == job_id
    await staff.outcome(job_id)
    with pytest.raises(IdempotencyConflict, match="was used with another payload"):
        await staff.producer.enqueue(ActOut(note="other"), idempotency_key=key)
    assert await refused(roles.url("reader"), "SELECT bulwark.enqueue('act_out', '{}')")


async def test_a_reader_is_told_in_one_sentence_what_he_may_not(staff: Staff, roles: House) -> None:
    job_id, _ = await staff.done(InsertRows(table="team", rows=[{"name": "Told"}]))
    await seal_all(staff.bench)
    cli = cli_as(roles, "reader")
    for words in (("audit", "verify"), ("parked",), ("rejects", str(job_id), "--export", "-")):
        result = await asyncio.to_thread(cli, *words)
        assert result.exit_code == 2, result.output
        assert "permission denied" in sentence(result)


async def test_tables_that_the_owner_makes_later_are_open_to_workers(
    staff: Staff, roles: House
) -> None:
    async with connected(roles.url("owner")) as owner:
        await owner.execute("CREATE TABLE IF NOT EXISTS later (id bigserial PRIMARY KEY, a int)")
    async with connected(roles.url("worker")) as worker:
        await worker.execute("INSERT INTO later (a) VALUES (1); UPDATE later SET a = 2")
        await worker.execute("SELECT nextval('later_id_seq'); DELETE FROM later")
    assert await refused(roles.url("reader"), "SELECT FROM later")


async def test_partitions_that_are_made_later_are_covered_by_their_parents(
    staff: Staff, roles: House
) -> None:
    async with connected(roles.url("worker")) as worker:
        await worker.execute("SELECT bulwark.ensure_partitions(7)")
    child = await staff.value(
        "SELECT max(relname) FROM pg_class WHERE relname ~ '^audit_2[0-9_]+$'"
    )
    assert (
        await staff.value("SELECT relowner::regrole::text FROM pg_class WHERE relname = $1", child)
        == "bulwark_owner"
    )
    assert await refused(roles.url("worker"), f"DELETE FROM bulwark.{child}")
    assert await refused(roles.url("reader"), f"SELECT before_sensitive FROM bulwark.{child}")


# What must not


REFUSED = {
    "operator": [
        "DELETE FROM bulwark.audit",
        "UPDATE bulwark.audit SET actor = 'eve'",
        "TRUNCATE bulwark.seal",
        "UPDATE bulwark.seal_block SET marks = ''",
        "INSERT INTO bulwark.rotation (month) VALUES ('2020-01-01')",
        "ALTER TABLE hero ADD COLUMN x int",
    ],
    "worker": [
        *(
            statement.format(table)
            for table in ("audit", "seal", "seal_block", "rotation")
            for statement in (
                "DELETE FROM bulwark.{}",
                "TRUNCATE bulwark.{}",
                "DROP TABLE bulwark.{}",
            )
        ),
        "UPDATE bulwark.audit SET actor = 'eve'",
        "UPDATE bulwark.seal SET mac = NULL",
        "UPDATE bulwark.seal_block SET marks = ''",
        "UPDATE bulwark.rotation SET role = 'eve'",
        "INSERT INTO bulwark.rotation (month) VALUES ('2020-01-01')",
        "SELECT FROM bulwark.audit FOR UPDATE",
        "UPDATE bulwark.verdict SET verdict = 'kept'",
        "DELETE FROM bulwark.chunk",
        "UPDATE alembic_version SET version_num = 'x'",
        "TRUNCATE bulwark.job",
        "TRUNCATE hero",
        "ALTER TABLE hero ADD COLUMN x int",
        "CREATE TABLE mine (id int)",
        "CREATE TABLE bulwark.mine (id int)",
        "CREATE SCHEMA mine",
        "ALTER TABLE bulwark.audit DETACH PARTITION bulwark.audit_default",
        (
            "CREATE TRIGGER t BEFORE INSERT ON bulwark.audit FOR EACH ROW"
            " EXECUTE FUNCTION bulwark.check_job_transition()"
        ),
        (
            "CREATE OR REPLACE FUNCTION bulwark.month_of(id uuid) RETURNS date LANGUAGE sql"
            " AS 'SELECT current_date'"
        ),
        "ALTER TABLE bulwark.audit DISABLE TRIGGER ALL",
        "SET ROLE bulwark_owner",
        "SET session_replication_role = 'replica'",
    ],
    "producer": [
        *(f"SELECT FROM {table} LIMIT 1" for table in ("team", "membership", "transfer")),
        "SELECT id FROM hero",
        "INSERT INTO team (name) VALUES ('x')",
        "SELECT payload FROM bulwark.job",
        "SELECT outcome FROM bulwark.job",
        "UPDATE bulwark.job SET state = 'cancelled'",
        "DELETE FROM bulwark.job",
        (
            "INSERT INTO bulwark.job (id, kind, payload, max_attempts, timeout_s, state)"
            " VALUES (gen_random_uuid(), 'k', '{}', 1, 1, 'succeeded')"
        ),
        "SELECT data FROM bulwark.spool",
        "DELETE FROM bulwark.idempotency",
        *(f"SELECT FROM bulwark.{one}" for one in ("audit", "chunk", "verdict", "seal", "worker")),
        "INSERT INTO bulwark.audit (job_id) VALUES (gen_random_uuid())",
        "SELECT bulwark.drop_partitions('audit', now())",
        "SELECT bulwark.drop_strays('audit', now(), 1)",
        "SELECT bulwark.ensure_partitions()",
        "SELECT bulwark.input_of(gen_random_uuid())",
        "CREATE TEMPORARY TABLE pg_class (oid oid)",
    ],
    "reader": [
        "SELECT payload FROM bulwark.job",
        "SELECT * FROM bulwark.job",
        "SELECT before_sensitive FROM bulwark.audit",
        "SELECT raw FROM bulwark.verdict",
        "SELECT data FROM bulwark.spool",
        "SELECT message FROM bulwark.parked",
        "SELECT marks FROM bulwark.seal_block",
        "SELECT secret_name FROM hero",
        "SELECT * FROM hero",
        "INSERT INTO team (name) VALUES ('x')",
        "UPDATE hero SET age = 1",
        "DELETE FROM transfer",
        (
            "INSERT INTO bulwark.job (id, kind, payload, max_attempts, timeout_s)"
            " VALUES (gen_random_uuid(), 'k', '{}', 1, 1)"
        ),
        "UPDATE bulwark.job SET priority = 9",
        "DELETE FROM bulwark.schedule",
        "SELECT bulwark.drop_partitions('audit', now())",
        "SELECT bulwark.ensure_partitions()",
    ],
    "auditor": [
        "UPDATE bulwark.audit SET actor = 'eve'",
        "DELETE FROM bulwark.seal",
        "INSERT INTO bulwark.seal_block DEFAULT VALUES",
        "SELECT payload FROM bulwark.job",
        "SELECT secret_name FROM hero",
        "SELECT bulwark.drop_strays('audit', now(), 1)",
    ],
}


@pytest.mark.parametrize(
    ("role", "statement"), [(role, one) for role, many in REFUSED.items() for one in many]
)
async def test_what_a_role_must_not_do_is_refused(roles: House, role: str, statement: str) -> None:
    assert await refused(roles.url(role), statement)


async def test_a_workers_temporary_tables_mislead_no_function_that_runs_as_the_owner(
    staff: Staff, roles: House
) -> None:
    made = await staff.value("SELECT count(*) FROM pg_inherits")
    async with connected(roles.url("worker")) as worker:
        await worker.execute(
            "CREATE TEMPORARY TABLE pg_inherits AS SELECT c.oid AS inhrelid,"
            " to_regclass('bulwark.audit')::oid AS inhparent FROM pg_catalog.pg_class AS c"
        )
        await worker.execute(
            "CREATE TEMPORARY TABLE pg_class AS SELECT oid, 'audit_2001_01'::name AS relname"
            " FROM pg_catalog.pg_class"
        )
        assert await worker.fetchval("SELECT bulwark.drop_partitions('audit', now())") == []
    assert await staff.value("SELECT count(*) FROM pg_inherits") == made


async def test_every_function_that_runs_as_its_owner_is_closed_and_has_a_fixed_path(
    staff: Staff,
) -> None:
    found = await staff.value(
        "SELECT array_agg(ROW(proname, proconfig::text)::text ORDER BY proname) FROM pg_proc"
        " WHERE prosecdef AND pronamespace = 'bulwark'::regnamespace"
        "   AND (proacl IS NULL OR has_function_privilege('public', oid, 'EXECUTE')"
        "        OR NOT proconfig::text ~ 'search_path=.*pg_temp\"?}')"
    )
    assert found is None
