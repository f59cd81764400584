"""What docs/arq-clients.md tells a plain arq client to do works, and what does not is parked."""

import asyncio
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from arq.connections import ArqRedis
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from db.ledger.parked import Reason
from jobs import discover_jobs
from tests.arq_side import working
from tests.inprocess import Bench
from tests.stage import SAMPLE_JOBS, Stage
from tests.workers import ROOT, environment, run_bulwark, until

PAGE = (ROOT / "docs/arq-clients.md").read_text()
SNIPPET = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def bench(sessions: async_sessionmaker[AsyncSession], database_url: str) -> Bench:
    """Knows no job but the product's own."""
    return Bench(sessions, database_url)


class Bulwark:
    """The command line in a process of its own, with the sample jobs."""

    def __init__(self, folder: Path, database_url: str, redis_url: str) -> None:
        self._folder = folder
        self._env = environment(database_url, redis_url, job_modules=",".join(SAMPLE_JOBS))

    async def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        return await asyncio.to_thread(run_bulwark, *words, env=self._env, folder=self._folder)

    async def parked(self) -> list[dict[str, Any]]:
        listed = await self("parked", "--json")
        return [json.loads(line) for line in listed.stdout.splitlines()]


@pytest.fixture
def bulwark(tmp_path: Path, database_url: str, redis_url: str) -> Bulwark:
    return Bulwark(tmp_path, database_url, redis_url)


@pytest.mark.usefixtures("worker")
async def test_the_documented_client_enqueues_a_job_without_knowing_bulwark(
    stage: Stage, env: dict[str, str], redis_url: str, tmp_path: Path
) -> None:
    assert SNIPPET is not None
    await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-I", "-c", SNIPPET.group(1)],
        env=env | {"REDIS_URL": redis_url, "PYTHONPATH": ""},
        cwd=tmp_path,
        check=True,
    )
    await until(lambda: stage.value("SELECT count(*) FROM team"), "the row is inserted")
    assert await stage.value("SELECT name FROM team") == "Red"
    assert await stage.value("SELECT kind FROM bulwark.job") == "insert_rows"


def test_the_page_explains_every_reason_for_which_a_message_is_parked() -> None:
    explained = re.findall(r"^\| `([a-z_]+)` ", PAGE, re.MULTILINE)
    assert explained == [reason.value for reason in Reason]


async def test_parked_messages_are_listed_and_one_can_be_made_a_job_once_its_name_is_known(
    bench: Bench, stage: Stage, client: ArqRedis, redis_url: str, bulwark: Bulwark
) -> None:
    async with working(bench, redis_url):
        await client.enqueue_job("act_out", {"note": "at last"}, _job_id="too early")
        await client.set("arq:job:foreign", pickle.dumps("?"))
        await client.zadd("arq:queue", {"foreign": 1})

        async def both_are_parked() -> bool:
            return len(await bulwark.parked()) == 2

        await until(both_are_parked, "both messages are parked")
    by_id = {one["arq_id"]: one for one in await bulwark.parked()}
    assert by_id["foreign"]["reason"] == "pickle"
    assert (by_id["too early"]["reason"], by_id["too early"]["kind"]) == ("unknown_job", "act_out")
    shown = await bulwark("parked")
    assert "too early" in shown.stdout

    made = await bulwark("parked", "--requeue", str(by_id["too early"]["number"]), "--json")
    job_id = UUID(json.loads(made.stdout)["job_id"])
    assert [one["arq_id"] for one in await bulwark.parked()] == ["foreign"]
    bench.jobs = discover_jobs(SAMPLE_JOBS)
    await bench.deliver(job_id)
    assert await stage.notes() == ["at last"]

    again = await bulwark("parked", "--requeue", str(by_id["too early"]["number"]))
    assert (again.returncode, "There is no parked message" in again.stderr) == (2, True)
    pickled = await bulwark("parked", "--requeue", str(by_id["foreign"]["number"]))
    assert (pickled.returncode, "stays parked" in pickled.stderr) == (2, True)
    assert "Traceback" not in again.stderr + pickled.stderr
