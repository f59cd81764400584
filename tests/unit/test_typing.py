"""mypy accepts how jobs are meant to be written and enqueued, and refuses what would fail."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAD = '''"""A snippet."""
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from jobs import (
    BatchResults, ChunkedRun, Claim, Outcome, Payload, Producer, Schedule, chunked_job,
    discover_jobs, job,
)
from jobs.insert_rows import InsertRows

class RenameTeam(Payload):
    team_id: int
    name: str = "Red"

class NoPayload(BaseModel):
    team_id: int

async def use(producer: Producer, session: AsyncSession) -> None:
'''
JOB = HEAD + "    ...\n\n"
RIGHT = {
    "enqueue": HEAD
    + """
    accepted = await producer.enqueue(
        RenameTeam(team_id=1), session=session, idempotency_key="k", run_at=datetime.now(),
        queue="slow", priority=1, attempts=2, timeout_s=3, actor="ann", correlation_id="c",
    )
    print(accepted.job_id.hex, accepted.created)
    many = await producer.enqueue_many([RenameTeam(team_id=1, name="Blue")], idempotency_keys=["a"])
    print(many[0].job_id)
    await producer.enqueue_many([RenameTeam(team_id=1), InsertRows(table="hero", rows=[])])
""",
    "jobs": JOB
    + """
@job(timeout_s=10, queue="slow", priority=1, max_attempts=3, max_age=timedelta(days=2))
async def rename_team(session: AsyncSession, payload: RenameTeam) -> None: ...

@job()
async def count_teams(session: AsyncSession, payload: RenameTeam) -> Outcome:
    return {"teams": payload.team_id}

async def swap_many(
    session: AsyncSession, orders: Sequence[tuple[RenameTeam, Claim]]
) -> BatchResults:
    return [{"team": payload.team_id, "actor": held.actor} for payload, held in orders]

@job(timeout_s=10, batch=swap_many)
async def swap_teams(session: AsyncSession, payload: RenameTeam, held: Claim) -> Outcome: ...

@chunked_job(timeout_s=10)
async def move_teams(run: ChunkedRun, payload: RenameTeam) -> dict[str, int]:
    return {"attempt": run.claim.attempt}

@job(schedules=[
    Schedule(name="a", cron="0 3 * * *"),
    Schedule(name="b", cron="0 3 * * *", missed="all", most=3, overlap="queue",
             timezone="Europe/Berlin", payload={"team_id": 1}, off_until="redis_url"),
], timeout_s=3)
async def sort_teams(session: AsyncSession, payload: RenameTeam) -> None: ...

taken: type[RenameTeam] = rename_team.payload
""",
}
WRONG = {
    "a dict": (HEAD, 'await producer.enqueue({"team_id": 1})', "arg-type"),
    "a model that is no payload": (
        HEAD,
        "await producer.enqueue(NoPayload(team_id=1))",
        "arg-type",
    ),
    "the class itself": (HEAD, "await producer.enqueue(RenameTeam)", "arg-type"),
    "a field missing": (HEAD, "await producer.enqueue(RenameTeam())", "call-arg"),
    "a field too many": (
        HEAD,
        "await producer.enqueue(RenameTeam(team_id=1, tem=1))",
        "call-arg",
    ),
    "a field of the wrong type": (
        HEAD,
        'await producer.enqueue(RenameTeam(team_id="one"))',
        "arg-type",
    ),
    "an option that does not exist": (
        HEAD,
        "await producer.enqueue(RenameTeam(team_id=1), retries=3)",
        "call-arg",
    ),
    "an option of the wrong type": (
        HEAD,
        'await producer.enqueue(RenameTeam(team_id=1), run_at="now")',
        "arg-type",
    ),
    "a wrong one among many": (
        HEAD,
        "await producer.enqueue_many([RenameTeam(team_id=1), NoPayload(team_id=1)])",
        "list-item",
    ),
    "a job without payload": (
        JOB,
        "async def wrong(session: AsyncSession) -> None: ...",
        "arg-type",
    ),
    "a job that is not async": (
        JOB,
        "def wrong(session: AsyncSession, payload: RenameTeam) -> None: ...",
        "arg-type",
    ),
    "a job for a dict": (
        JOB,
        "async def wrong(session: AsyncSession, payload: dict[str, int]) -> None: ...",
        "type-var",
    ),
    "a job for a model that is no payload": (
        JOB,
        "async def wrong(session: AsyncSession, payload: NoPayload) -> None: ...",
        "type-var",
    ),
    "a job that is given a run": (
        JOB,
        "async def wrong(run: ChunkedRun, payload: RenameTeam) -> None: ...",
        "arg-type",
    ),
    "a job that returns a number": (
        JOB,
        "async def wrong(session: AsyncSession, payload: RenameTeam) -> int: return 1",
        "arg-type",
    ),
}
WRONG_OPTIONS = {
    "a misspelt option": ("timout_s=10", "call-arg"),
    "a number as text": ('timeout_s="10"', "arg-type"),
    "a misspelt option of a schedule": (
        'schedules=[Schedule(name="a", cron="0 3 * * *", zone="UTC")]',
        "call-arg",
    ),
    "a policy that there is not": (
        'schedules=[Schedule(name="a", cron="0 3 * * *", missed="twice")]',
        "arg-type",
    ),
    "a batch form that is none": ("batch=discover_jobs", "arg-type"),
}


def snippets() -> Mapping[str, str]:
    """Every snippet by the name of its case."""
    wrong = {
        case: head + (f"    {line}\n" if head is HEAD else f"@job()\n{line}\n")
        for case, (head, line, _) in WRONG.items()
    }
    options = {
        case: JOB
        + f"@job({option})\nasync def f(session: AsyncSession, payload: RenameTeam) -> None: ...\n"
        for case, (option, _) in WRONG_OPTIONS.items()
    }
    chunked = {
        "a chunked job that is given a session": JOB
        + "@chunked_job()\nasync def f(s: AsyncSession, payload: RenameTeam) -> None: ...\n"
    }
    return {**RIGHT, **wrong, **options, **chunked}


EXPECTED = {
    **dict.fromkeys(RIGHT),
    **{case: code for case, (_, _, code) in WRONG.items()},
    **{case: code for case, (_, code) in WRONG_OPTIONS.items()},
    "a chunked job that is given a session": "arg-type",
}


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """What a user's mypy, strict and without any plugin, says about each case."""
    folder = tmp_path_factory.mktemp("snippets")
    files = {case: folder / f"snippet_{number}.py" for number, case in enumerate(snippets())}
    for case, source in snippets().items():
        files[case].write_text(source)
    config = folder / "mypy.ini"
    config.write_text("[mypy]\nstrict = True\nexplicit_package_bases = True\n")
    cache = ["--cache-dir", ".mypy_cache/without_plugin"]
    words = [sys.executable, "-m", "mypy", "--config-file", str(config), *cache]
    checked = subprocess.run(
        [*words, *map(str, files.values())], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert checked.returncode in {0, 1}, checked.stdout + checked.stderr
    lines = [line for line in checked.stdout.splitlines() if ": error:" in line]
    return {
        case: "\n".join(line for line in lines if Path(line.split(":")[0]).name == file.name)
        for case, file in files.items()
    }


@pytest.mark.parametrize("case", EXPECTED)
def test_mypy_judges_as_the_program_would(complaints: Mapping[str, str], case: str) -> None:
    code = EXPECTED[case]
    if code is None:
        assert complaints[case] == ""
    else:
        assert f"[{code}]" in complaints[case]
        assert len(complaints[case].splitlines()) == 1
