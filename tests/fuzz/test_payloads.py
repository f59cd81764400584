"""A job of any kind with any payload comes to an end with a reason, and the next one is done."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from structlog.testing import capture_logs

from jobs import discover_jobs
from jobs._errors import JobError
from jobs.insert_rows import InsertRows
from tests.fuzzing import JSON, Tried, fuzzed
from tests.inprocess import Bench

OURS = discover_jobs()
KINDS = sorted(OURS)
ENQUEUE = """
    INSERT INTO bulwark.job (id, kind, payload, max_attempts, timeout_s)
    VALUES ($1, $2, $3::jsonb, 1, 30)
"""
REFUSALS = ("Rejected", "InputError")
HOSTILE = ('"; DROP TABLE team; --', "%s", ":x", "select", "{name}", "a" * 64, "", "é", "name'")
COLUMNS = ("id", "name", "age", "team_id", "email", "secret_name", "deleted_at", "version")

words = st.sampled_from(
    [*COLUMNS, *HOSTILE, "hero", "team", "membership", "team.name", "team_id.name", "{name}|{age}"]
)
tables = st.sampled_from(["hero", "team", "membership", "transfer", "job", "Hero", *HOSTILE])
values = (
    JSON | words | st.integers(-5, 5) | st.sampled_from([2**31, 2**63, -(2**63) - 1, 1e308, "NaN"])
)
rows = st.lists(
    st.dictionaries(st.sampled_from(COLUMNS) | words, values, max_size=4), max_size=4
) | st.lists(st.fixed_dictionaries({"name": st.text("ab", max_size=2), "age": values}), max_size=4)
operators = st.dictionaries(
    st.sampled_from(["eq", "ne", "lt", "le", "gt", "ge", "in", "not_in", "like", "drop"]),
    values | st.lists(values, max_size=3),
    max_size=2,
)
conditions = st.dictionaries(words, values | st.lists(values, max_size=3) | operators, max_size=3)
sources = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["in_place", "spooled", "x"]),
        "path": st.sampled_from(
            ["rows.csv", "../rows.csv", "/etc/passwd", "s3:///", "s3://b/k", "file://x/y", "\\\\x"]
        ),
    },
    optional={
        "format": st.sampled_from(["csv", "ndjson", "parquet", "x"]),
        "encoding": st.sampled_from(["utf-8", "rot13", "utf-16", "zlib", "x" * 200]),
        "delimiter": st.sampled_from([",", "", '"', ";;", "\n"]),
        "name": words,
        "sha256": words,
        "raw_bytes": st.integers(-1, 2**64),
        "text_bytes": st.integers(-1, 2**64),
        "compression": st.sampled_from(["none", "gzip", "zstd"]),
        "part_bytes": st.integers(-1, 2**64),
        "columns": st.lists(words, max_size=3),
    },
)
ids = st.lists(st.integers(-2, 5) | st.integers(2**31, 2**70) | JSON, max_size=4)
KNOWN: dict[str, st.SearchStrategy[Any]] = {
    "table": tables,
    "tables": st.lists(tables, max_size=3),
    "rows": rows,
    "keys": st.lists(values, max_size=4),
    "filter": conditions,
    "source": sources,
    "map": st.dictionaries(words, words, max_size=3),
    "where": st.dictionaries(words, words, max_size=2),
    "constants": st.dictionaries(words, values, max_size=2),
    "values": st.dictionaries(words, values, max_size=2),
    "ignore": st.lists(words, max_size=3),
    "key": st.lists(words, max_size=2),
    "update": st.lists(words, max_size=2),
    "expect_version": words,
    "retention_days": st.dictionaries(tables, st.integers(-1, 2**40), max_size=2),
    "archive": st.sampled_from(["", "/nowhere/at/all", "..", "s3:///", "\\\\"]),
    "until": st.sampled_from(["03:00", "25:00", "03:00 Europe/Paris", "03:00 ../../etc", ""]),
    "hero_ids": ids,
    "hero_ids_a": ids,
    "hero_ids_b": ids,
    "expect_versions": st.dictionaries(st.integers(-1, 5).map(str), st.integers(-1, 5), max_size=2),
}
USUAL: dict[str, st.SearchStrategy[Any]] = {
    "from_team_id": st.none() | st.integers(1, 3),
    "to_team_id": st.none() | st.integers(1, 3),
    "team_a_id": st.integers(1, 3),
    "team_b_id": st.integers(1, 3),
    "chunk_rows": st.integers(1, 5),
}


def _fields(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """Some of the fields of its payload, mostly with values that are nearly right."""
    declared = OURS[kind].payload.model_fields
    required = {name for name, field in declared.items() if field.is_required()}
    likely = {name: KNOWN.get(name, USUAL.get(name, values)) for name in declared}
    any_value = {name: strategy | values for name, strategy in likely.items()}
    nearly = st.fixed_dictionaries(
        {name: likely[name] for name in required},
        optional={name: likely[name] for name in declared if name not in required},
    )
    return nearly | st.fixed_dictionaries({}, optional={**any_value, "unknown": values})


def _sparse(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """What it must be given and one thing more, so that it is not refused for another field."""
    declared = OURS[kind].payload.model_fields
    need = [name for name, field in declared.items() if field.is_required()]
    return st.sampled_from(sorted(declared)).flatmap(
        lambda more: st.fixed_dictionaries(
            {name: KNOWN.get(name, USUAL.get(name, values)) for name in {*need, more}}
        )
    )


def _nested(depth: int) -> str:
    return '{"table": "hero", "rows": [{"name": ' + "[" * depth + "]" * depth + "}]}"


payloads = st.sampled_from(KINDS).flatmap(
    lambda kind: st.tuples(st.just(kind), _sparse(kind) | _fields(kind) | _sparse(kind) | JSON)
)
ODD_TEXTS = [
    *map(_nested, (10, 250, 300, 900, 990, 1_500, 6_000)),
    '{"table": "hero", "rows": [{"name": "x", "age": ' + "9" * 4_000 + "}]}",
    '{"table": "hero", "rows": [{"name": "x", "age": ' + "9" * 5_000 + "}]}",
    '{"table": "hero", "rows": [{"name": "x", "age": 1e5000}]}',
    '{"table": "hero", "rows": [], "chunk_rows": 1e400}',
    '{"source": {"text_bytes": "many"}}',
    '{"source": {"text_bytes": 1e400}}',
    "[]",
    "null",
    '"text"',
    "1e400",
]


@pytest.fixture
async def desk(bench: Bench, connection: asyncpg.Connection, tmp_path: Path) -> Bench:
    """A few teams and heroes, and a folder with a file that may be read."""
    await connection.execute(
        "INSERT INTO team (name) VALUES ('Red'), ('Blue');"
        "INSERT INTO hero (name, team_id) VALUES ('Ann', 1), ('Bob', 2), ('Cid', NULL)"
    )
    (tmp_path / "rows.csv").write_text("name,age\nDan,5\nEve,x\n")
    bench.import_folders.append(tmp_path)
    return bench


async def _ends_with_a_reason(bench: Bench, job_id: UUID) -> None:
    """Run the job, which may well be refused, but not by a traceback; its verdicts add up."""
    with capture_logs() as logs:
        await bench.deliver(job_id)
    assert [line for line in logs if _is_ours(line)] == []
    report = await bench.report(job_id)
    ended = (report.kind, report.state, report.reason, report.error)
    assert report.state in ("succeeded", "failed"), ended
    assert report.state == "succeeded" or (report.reason == "rejected" and report.error), ended
    assert report.counted == report.tally.rows
    if report.state == "succeeded" and report.tally.rows:
        assert report.adds_up


def _is_ours(line: Mapping[str, Any]) -> bool:
    """Whether it tells of an error that is not the payload's; what is refused cannot be closed."""
    reason = str(line.get("reason"))
    unclosed = line["event"] == "job.not_closed" and not reason.startswith(REFUSALS)
    return unclosed or line["event"] in ("job.raised", "job.not_claimed", "batch.failed")


async def _goes_on(bench: Bench) -> None:
    healthy = await bench.run(InsertRows(table="team", rows=[{"name": f"Team {uuid4()}"}]))
    assert dict(await bench.counts(healthy)) == {"inserted": 1}


async def _run_text(bench: Bench, connection: asyncpg.Connection, kind: str, text: str) -> None:
    job_id = uuid4()
    try:
        await connection.execute(ENQUEUE, job_id, kind, text)
    except (asyncpg.DataError, asyncpg.StatementTooComplexError):
        return  # PostgreSQL itself does not take it: it holds a NUL, or is too deep
    await _ends_with_a_reason(bench, job_id)


@fuzzed(250)
@given(asked=payloads)
async def test_any_payload_that_sql_puts_there_ends_with_a_reason(
    asked: tuple[str, Any], desk: Bench, connection: asyncpg.Connection, tried: Tried
) -> None:
    tried.one()
    kind, payload = asked
    await _run_text(desk, connection, kind, json.dumps(payload))
    if tried.inputs % 10 == 0:
        await _goes_on(desk)


@pytest.mark.parametrize("text", ODD_TEXTS, ids=lambda text: f"{text[:20]} {len(text)}")
@pytest.mark.parametrize("kind", ["insert_rows", "transfer_heroes", "update_rows"])
async def test_json_that_only_postgresql_can_hold_ends_with_a_reason(
    kind: str, text: str, desk: Bench, connection: asyncpg.Connection, tried: Tried
) -> None:
    tried.one()
    await _run_text(desk, connection, kind, text)
    await _goes_on(desk)


@fuzzed(120)
@given(asked=payloads)
async def test_a_producer_refuses_a_payload_in_a_sentence_or_its_job_ends_with_a_reason(
    asked: tuple[str, Any], desk: Bench, tried: Tried
) -> None:
    tried.one()
    kind, given_ = asked
    try:
        payload = OURS[kind].payload.model_validate(given_)
        accepted = await desk.producer.enqueue(payload, attempts=1)
    except (ValidationError, JobError) as error:
        assert str(error)  # noqa: PT017 - either way is right
        return
    await _ends_with_a_reason(desk, accepted.job_id)
