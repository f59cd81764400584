"""An import that is interrupted ends as if it had not been; one whose file changes ends at once."""

import asyncio
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args
from uuid import UUID

import asyncpg
import pytest

from db.registry import discover_models
from jobs._errors import InputError
from jobs._input import InPlace, open_input
from jobs._run import ChunkedRun
from tests import unusual_models
from tests.inprocess import Bench, Way

ROOT = Path(__file__).parents[2]
EITHER_WAY = pytest.mark.parametrize("way", get_args(Way))
TAKEN_BACK_AFTER_EACH_CHUNK = """
    CREATE FUNCTION take_back() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN
            PERFORM set_config('lock_timeout', '50', true); -- the chunk behind holds the job's row
            UPDATE bulwark.job SET state = 'queued', reason = 'rescued', run_at = now()
             WHERE id = NEW.job_id;
            RETURN NULL;
        END $$;
    CREATE TRIGGER take_back AFTER UPDATE ON bulwark.chunk
        FOR EACH ROW EXECUTE FUNCTION take_back();
"""
KILLED_AT_EVERY_SECOND_TRY = """
    CREATE SEQUENCE tries;
    CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN
            IF nextval('tries') % 2 = 1 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;
            RETURN NULL;
        END $$;
    CREATE TRIGGER die AFTER UPDATE ON bulwark.chunk FOR EACH ROW EXECUTE FUNCTION die();
"""
ROWS = (
    ["name,age,external_id,wanted"]
    + [f'"Hero\n{n}",{n},{n % 17},{"no" if n % 5 == 0 else "yes"}' for n in range(12)]
    + ["Old,-1,x,yes", "Short"]
    + [f"Hero {n},{n},{n % 17},yes" for n in range(12, 24)]
)


@pytest.fixture
def bench(bench: Bench, tmp_path: Path) -> Bench:
    bench.models = discover_models([unusual_models.__name__])
    bench.import_folders.append(tmp_path)
    return bench


async def run_to_the_end(bench: Bench, job_id: UUID) -> int:
    """Deliver the job as often as it takes; how often that was."""
    deliveries = 0
    while (await bench.job(job_id)).state == "queued":
        await bench.deliver(job_id)
        deliveries += 1
        assert deliveries < 50
    return deliveries


async def what_came_of(bench: Bench, connection: asyncpg.Connection, job_id: UUID) -> Any:
    """The table, the verdicts, the receipts, the audit with rows for ids, and the end."""
    heroes = await connection.fetch("SELECT id, name, age, external_id FROM hero ORDER BY id")
    chunks = await connection.fetch(
        "SELECT chunk_no, first_row, rows, filtered, start_byte, end_byte, first_line, next_line,"
        " counts, detail FROM bulwark.chunk WHERE job_id = $1 ORDER BY chunk_no",
        job_id,
    )
    audited = [
        (
            entry["chunk_no"],
            entry["rows"],
            [
                hero["name"]
                for hero in heroes
                if any(low <= hero["id"] <= high for low, high in entry["keys"]["ranges"])
            ],
        )
        for entry in await bench.audit(job_id)
    ]
    done = await bench.job(job_id)
    return (
        [tuple(hero)[1:] for hero in heroes],
        await bench.verdicts(job_id),
        [tuple(one) for one in chunks],
        audited,
        (done.state, done.reason, done.error, done.outcome, done.crashes),
    )


@EITHER_WAY
@pytest.mark.parametrize(
    "request_",
    [{}, {"on_conflict": "skip"}, {"max_rejects": 3}, {"on_invalid": "abort"}],
    ids=["reject", "skip", "a few rejects", "abort"],
)
@pytest.mark.parametrize("trouble", [TAKEN_BACK_AFTER_EACH_CHUNK, KILLED_AT_EVERY_SECOND_TRY],
                         ids=["taken back", "killed"])  # fmt: skip
async def test_an_interrupted_import_ends_exactly_as_an_undisturbed_one(
    trouble: str,
    request_: dict[str, Any],
    way: Way,
    bench: Bench,
    connection: asyncpg.Connection,
    tmp_path: Path,
) -> None:
    path = tmp_path / "heroes.csv.gz"
    path.write_bytes(gzip.compress("\r\n".join(ROWS).encode()))
    request = {"table": "hero", "where": {"wanted": "yes"}, "chunk_rows": 6, **request_}
    expected = await what_came_of(bench, connection, await bench.run_file(path, way, **request))
    assert len(expected[2]) >= 4

    await connection.execute("TRUNCATE hero RESTART IDENTITY CASCADE" + ";" + trouble)
    job_id = await bench.enqueue_file(path, way, **request)
    deliveries = await run_to_the_end(bench, job_id)
    assert await what_came_of(bench, connection, job_id) == expected
    assert deliveries == (1 + len(expected[2]) if trouble == TAKEN_BACK_AFTER_EACH_CHUNK else 1)


async def test_a_restart_with_another_file_is_refused_and_keeps_what_was_committed(
    bench: Bench, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    path = tmp_path / "heroes.csv"
    path.write_text("name\nAnn\nBob\nCid\n")
    job_id = await bench.enqueue_file(path, "in place", table="hero", chunk_rows=1)
    await connection.execute(TAKEN_BACK_AFTER_EACH_CHUNK)
    await bench.deliver(job_id)
    await bench.deliver(job_id)
    path.write_text("name\nAnn\nBob\nDan\n")
    await bench.deliver(job_id)
    done = await bench.job(job_id)
    assert (done.state, done.reason) == ("failed", "rejected")
    assert "not the one that this job began with" in str(done.error)
    assert [row["name"] for row in await connection.fetch("SELECT name FROM hero")] == ["Ann"]


def _append(path: Path) -> None:
    with path.open("a") as file:
        file.write("more\n")


def _replace(path: Path) -> None:
    other = path.with_name("other.csv")
    other.write_bytes(path.read_bytes())
    other.replace(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "rewritten": lambda path: path.write_text("title\nother\n"),
    "appended to": _append,
    "cut short": lambda path: path.write_text("title\n0\n1\n2\n3\n"),
    "replaced": _replace,
    "removed": Path.unlink,
}


@pytest.mark.usefixtures("unusual_tables")
@pytest.mark.parametrize("change", CHANGES)
async def test_a_file_that_changes_while_it_is_imported_ends_the_import(
    change: str, bench: Bench, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    path = tmp_path / "notes.csv"
    titles = [str(n) for n in range(10)]
    path.write_text("title\n" + "".join(f"{title}\n" for title in titles))
    unusual_models.reading["4"] = lambda: CHANGES[change](path)
    job_id = await bench.run_file(path, "in place", table="note", chunk_rows=2)
    done = await bench.job(job_id)
    assert (done.state, done.reason) == ("failed", "rejected")
    assert "was changed while the job read it" in str(done.error)
    rows = [row["title"] for row in await connection.fetch("SELECT title FROM note ORDER BY id")]
    assert rows == titles[: len(rows)]
    assert len(rows) in (2, 4)  # the chunk before may or may not have been on its way
    expected = {"inserted": len(rows)}
    if change == "replaced":  # by the same bytes, so that the rest can still be counted
        expected["not_reached"] = len(titles) - len(rows)
    assert dict(await bench.counts(job_id)) == expected


async def test_a_file_that_is_cut_short_behind_the_rows_read_does_not_look_complete(
    tmp_path: Path,
) -> None:
    path = tmp_path / "notes.csv"
    line = "x" * 999 + "\n"
    path.write_text("title\n" + line * 1000)
    source = InPlace(type="in_place", path=str(path))
    async with open_input(cast(ChunkedRun, None), None, source, [tmp_path]) as opened:
        parts = opened.parts(100, 1024 * 1024, opened.data_start)
        assert len(next(parts).rows) == 100
        path.write_text("title\n" + line * 100)
        with pytest.raises(InputError, match="was changed while the job read it"):
            list(parts)


# A file that is larger than the memory it takes

IMPORT_AND_MEASURE = """
import asyncio, json, re, sys
from pathlib import Path
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from tests.inprocess import Bench

async def run():
    url, path = sys.argv[1:]
    engine = create_async_engine(url)
    bench = Bench(async_sessionmaker(engine), url)
    job_id = await bench.run_file(Path(path), "spooled", table="hero", map={"club": "team.name"})
    done = await bench.job(job_id)
    await engine.dispose()
    # ru_maxrss would begin with the memory of the process that this one was forked from
    peak_kib = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
    print(json.dumps({"state": done.state, "outcome": done.outcome, "peak_kib": peak_kib}))

asyncio.run(run())
"""


async def test_importing_300_000_rows_takes_less_than_200_megabytes(
    connection: asyncpg.Connection, database_url: str, tmp_path: Path
) -> None:
    await connection.execute(
        "INSERT INTO team (name) SELECT 'Team ' || n FROM generate_series(0, 499) n"
    )
    path = tmp_path / "heroes.csv.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.write("name,age,external_id,club\n")
        for n in range(300_000):
            file.write(f"Hero number {n},{-1 if n % 100 == 0 else n % 90},key-{n},Team {n % 500}\n")
    importing = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        IMPORT_AND_MEASURE,
        database_url,
        str(path),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    printed, _ = await importing.communicate()
    assert importing.returncode == 0
    told = json.loads(printed.splitlines()[-1])
    assert told["state"] == "succeeded"
    assert told["outcome"]["verdicts"] == {"inserted": 297_000, "rejected": 3_000}
    assert told["peak_kib"] * 1024 < 200_000_000
