"""`bulwark import --watch`: each file that arrives is imported once, whatever happens meanwhile."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from db.retry import BUDGETS, Fault
from tests.deep_folder import LONG_NAME, deep_folder
from tests.proxy import Cut, Road, proxied
from tests.workers import ROOT, environment, until
from worker.watched_folder import ACCEPTED, FAILED, TAKEN

INTERVAL_S = 0.1

Query = Callable[[str], Any]


class Watcher:
    """A real watcher in a process of its own; what it says goes into files."""

    def __init__(self, folder: Path, logs: Path, env: dict[str, str], words: tuple[str, ...]):
        self.said, self.errors = logs.with_suffix(".out"), logs.with_suffix(".err")
        command = ["import", "team", "--watch", str(folder), "--json", *words]
        if "--interval-s" not in words:
            command += ["--interval-s", str(INTERVAL_S)]
        with self.said.open("w") as out, self.errors.open("w") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker.cli", *command],
                env=env,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    def told(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.said.read_text().splitlines()]

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self._process.poll() is None:
            self.send(number)
        return self._process.wait(30)

    def wait(self) -> int:
        return self._process.wait(30)


Watch = Callable[..., Watcher]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    return folder


@pytest.fixture
def watch(folder: Path, tmp_path: Path, database_url: str, redis_url: str) -> Iterator[Watch]:
    """Start a watcher of teams; those that are left at the end are killed."""
    started: list[Watcher] = []

    def start(*words: str, url: str = database_url) -> Watcher:
        env = environment(url, redis_url)
        started.append(Watcher(folder, tmp_path / f"watcher-{len(started)}", env, words))
        return started[-1]

    yield start
    for one in started:
        one.end(signal.SIGKILL)


def drop(folder: Path, name: str, text: str) -> None:
    """Put a file there as a careful sender does."""
    unfinished = folder / f"{name}.part"
    unfinished.write_text(text)
    unfinished.rename(folder / name)


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


async def begun(folder: Path) -> None:
    """Wait for a watcher to have made its folders."""

    async def there() -> bool:
        return FAILED in names(folder)

    await until(there, "a watcher has begun")


async def looking(connection: asyncpg.Connection) -> None:
    """Wait for a watcher to be connected, which it is once it will make no folder any more."""

    async def there() -> bool:
        connected = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND application_name = 'bulwark command line'"
        )
        return bool(await connection.fetchval(connected))

    await until(there, "a watcher is connected")


async def accepted(folder: Path, *wanted: str) -> None:
    async def there() -> bool:
        place = folder / ACCEPTED
        return place.exists() and set(wanted) <= set(names(place)) and not names(folder / TAKEN)

    await until(there, f"{wanted} are accepted")


async def jobs(connection: asyncpg.Connection) -> list[tuple[str, str]]:
    """The file and the id of each job, in the order in which they were made."""
    rows = await connection.fetch(
        "SELECT payload -> 'source' ->> 'name' AS name, id::text FROM bulwark.job ORDER BY id"
    )
    return [tuple(row) for row in rows]


async def test_a_watch_whose_reader_has_gone_ends_without_a_word(
    folder: Path, connection: asyncpg.Connection, database_url: str, redis_url: str
) -> None:
    drop(folder, "a.csv", "name\nRed\n")
    reader, writer = os.pipe()
    os.close(reader)
    words = ["import", "team", "--watch", str(folder), "--json", "--interval-s", str(INTERVAL_S)]
    try:
        ended = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "worker.cli", *words],
            env=environment(database_url, redis_url),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
        )
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert [name for name, _ in await jobs(connection)] == ["a.csv"]
    assert names(folder / ACCEPTED) != []


async def test_what_is_there_and_what_arrives_is_imported(
    watch: Watch, folder: Path, connection: asyncpg.Connection
) -> None:
    drop(folder, "early.csv", "name\nRed\n")
    watcher = watch("--queue", "files")
    await accepted(folder, "early.csv")
    drop(folder, "late.csv", "name\nBlue\n")
    await accepted(folder, "late.csv")

    found = await jobs(connection)
    assert [name for name, _ in found] == ["early.csv", "late.csv"]
    assert watcher.end() == 0
    assert [(one["file"], one["job_id"], one["created"]) for one in watcher.told()] == [
        (name, job_id, True) for name, job_id in found
    ]
    assert await connection.fetchval("SELECT bool_and(queue = 'files') FROM bulwark.job")
    assert watcher.errors.read_text() == ""


@pytest.mark.usefixtures("worker")
async def test_the_rows_of_a_watched_file_go_into_the_table(
    watch: Watch, folder: Path, connection: asyncpg.Connection
) -> None:
    drop(folder, "teams.csv", "club\nRed\nBlue\n")
    assert watch("--once", "--map", "club=name").wait() == 0

    async def teams() -> bool:
        rows = await connection.fetch("SELECT name FROM team ORDER BY id")
        return [row["name"] for row in rows] == ["Red", "Blue"]

    await until(teams, "both teams are there")


async def test_a_bad_file_is_put_aside_with_its_reason_and_stops_no_other(
    watch: Watch, folder: Path, connection: asyncpg.Connection
) -> None:
    drop(folder, "bad.csv", "nmae\nRed\n")
    drop(folder, "damaged.csv.gz", "\x1f\x08not gzip at all")
    drop(folder, "good.csv", "name\nRed\n")
    (folder / "damaged.csv.gz").write_bytes(b"\x1f\x8b\x08\x00 not gzip at all")
    watcher = watch("--once")

    assert watcher.wait() == 2
    assert [name for name, _ in await jobs(connection)] == ["good.csv"]
    assert names(folder / FAILED) == [
        "bad.csv",
        "bad.csv.reason",
        "damaged.csv.gz",
        "damaged.csv.gz.reason",
    ]
    assert "'nmae' has no field in team" in (folder / FAILED / "bad.csv.reason").read_text()
    assert sorted(one["file"] for one in watcher.told() if one["reason"]) == [
        "bad.csv",
        "damaged.csv.gz",
    ]


async def test_a_file_that_cannot_be_moved_is_told_once_and_stops_no_other(
    watch: Watch, folder: Path, connection: asyncpg.Connection
) -> None:
    folder = deep_folder(folder)
    drop(folder, LONG_NAME, "name\nRed\n")
    watcher = watch("--watch", str(folder))
    await until(lambda: has_told(watcher, 1), "the file is told")
    for number in range(3):  # looks that find it again
        drop(folder, f"{number}.csv", f"name\nTeam {number}\n")
        await accepted(folder, f"{number}.csv")

    told = watcher.told()
    assert [one["file"] for one in told] == [LONG_NAME, "0.csv", "1.csv", "2.csv"]
    assert [one["left"] for one in told] == [True, False, False, False]
    assert "cannot be moved" in told[0]["reason"]
    assert len(await jobs(connection)) == 3
    assert (folder / LONG_NAME).exists()
    assert watcher.end() == 0
    assert watcher.errors.read_text() == ""


async def test_a_file_is_not_taken_while_it_is_written(
    watch: Watch, folder: Path, connection: asyncpg.Connection
) -> None:
    watch("--interval-s", "5")
    drop(folder, "other.csv", "name\nRed\n")
    text = "name\n"

    async def other_is_accepted_while_it_grows() -> bool:
        nonlocal text
        text += f"Team {len(text)}\n"
        with (folder / "growing.csv").open("w") as file:
            file.write(text)
        return (folder / ACCEPTED / "other.csv").exists()

    await until(other_is_accepted_while_it_grows, "the other file is accepted")
    assert (folder / "growing.csv").exists()
    await accepted(folder, "growing.csv")

    size = "SELECT (payload -> 'source' ->> 'text_bytes')::int FROM bulwark.job ORDER BY id"
    assert [row[0] for row in await connection.fetch(size)][1:] == [len(text)]


async def test_two_watchers_import_each_file_once(
    watch: Watch, folder: Path, connection: asyncpg.Connection
) -> None:
    both = [watch(), watch()]
    wanted = [f"{number}.csv" for number in range(20)]
    for name in wanted:
        drop(folder, name, f"name\nTeam {name}\n")
    await accepted(folder, *wanted)

    assert sorted(name for name, _ in await jobs(connection)) == sorted(wanted)
    assert names(folder / ACCEPTED) == sorted(wanted)
    assert names(folder / FAILED) == []
    assert [one.end() for one in both] == [0, 0]
    assert sorted(told["file"] for one in both for told in one.told()) == sorted(wanted)


async def test_a_watcher_killed_behind_the_acceptance_imports_the_file_no_second_time(
    watch: Watch, folder: Path, connection: asyncpg.Connection
) -> None:
    first = watch()
    await looking(connection)
    shutil.rmtree(folder / ACCEPTED)
    (folder / ACCEPTED).touch()  # no file can be moved into a file
    drop(folder, "teams.csv", "name\nRed\n")
    await until(lambda: jobs(connection), "the job is accepted")
    first.end(signal.SIGKILL)
    (folder / ACCEPTED).unlink()
    for gone in ("idempotency", "spool"):  # as if it was long ago
        await connection.execute(f"DELETE FROM bulwark.{gone}")
    assert re.fullmatch(r"[0-9a-f-]{36}", names(folder / TAKEN)[0])

    second = watch()
    await accepted(folder, "teams.csv")

    assert len(await jobs(connection)) == 1
    assert await connection.fetchval("SELECT count(*) FROM bulwark.spool") == 0
    assert second.end() == 0
    assert [one["created"] for one in second.told()] == [True]


async def test_a_watcher_killed_before_the_acceptance_leaves_the_file_to_another(
    watch: Watch, folder: Path, connection: asyncpg.Connection
) -> None:
    other = watch()
    await begun(folder)
    other.send(signal.SIGSTOP)
    async with connection.transaction():
        await connection.execute("LOCK TABLE bulwark.spool IN EXCLUSIVE MODE")
        first = watch()
        drop(folder, "teams.csv", "name\nRed\n")
        await until(lambda: _somebody_waits(connection), "the watcher stores the file")
        first.end(signal.SIGKILL)
    assert not (folder / "teams.csv").exists()
    assert await jobs(connection) == []
    other.send(signal.SIGCONT)

    await accepted(folder, "teams.csv")
    assert [name for name, _ in await jobs(connection)] == ["teams.csv"]
    assert [one["file"] for one in other.told()] == ["teams.csv"]


async def _somebody_waits(connection: asyncpg.Connection) -> bool:
    return bool(
        await connection.fetchval(
            "SELECT count(*) FROM pg_locks WHERE NOT granted"
            " AND relation = 'bulwark.spool'::regclass"
        )
    )


async def test_a_file_is_its_name_and_content_and_sent_again_it_leads_to_its_first_job(
    watch: Watch, folder: Path, connection: asyncpg.Connection
) -> None:
    watcher = watch()
    sent = [("a.csv", "Red"), ("a.csv", "Red"), ("a.csv", "Blue"), ("b.csv", "Red")]
    for number, (name, team) in enumerate(sent, 1):
        drop(folder, name, f"name\n{team}\n")
        await until(lambda: has_told(watcher, number), f"file {number} was told")  # noqa: B023 - awaited within its turn

    found = await jobs(connection)
    assert [name for name, _ in found] == ["a.csv", "a.csv", "b.csv"]
    assert [one["created"] for one in watcher.told()] == [True, False, True, True]
    assert watcher.told()[1]["job_id"] == watcher.told()[0]["job_id"]
    assert names(folder / ACCEPTED) == ["a.2.csv", "a.3.csv", "a.csv", "b.csv"]


async def has_told(watcher: Watcher, number: int) -> bool:
    return len(watcher.told()) >= number


@pytest.mark.usefixtures("worker")
async def test_a_file_whose_job_failed_can_be_sent_again(
    watch: Watch, folder: Path, connection: asyncpg.Connection
) -> None:
    failed = "SELECT count(*) FROM bulwark.job WHERE state = 'failed'"
    watch("--on-invalid", "abort")
    for number in (1, 2):
        drop(folder, "a.csv", "name,roster_limit\nRed,-1\n")

        async def has_failed(wanted: int = number) -> bool:
            return bool(await connection.fetchval(failed) == wanted)

        await until(has_failed, f"{number} jobs have failed")

    assert [name for name, _ in await jobs(connection)] == ["a.csv", "a.csv"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_watcher_told_to_stop_ends_with_0(
    watch: Watch, folder: Path, number: signal.Signals
) -> None:
    watcher = watch()
    drop(folder, "a.csv", "name\nRed\n")
    await accepted(folder, "a.csv")

    assert watcher.end(number) == 0
    assert watcher.errors.read_text() == ""


async def test_a_database_that_is_away_is_waited_for_with_one_line(
    watch: Watch, folder: Path, connection: asyncpg.Connection, database_url: str
) -> None:
    road = Road(database_url)
    await road.open()
    watcher = watch(url=road.url)
    drop(folder, "a.csv", "name\nRed\n")
    await accepted(folder, "a.csv")
    await road.close()
    drop(folder, "b.csv", "name\nBlue\n")

    async def says_so() -> bool:
        return "PostgreSQL cannot be reached" in watcher.errors.read_text()

    await until(says_so, "the watcher says that PostgreSQL is away")
    assert [name for name, _ in await jobs(connection)] == ["a.csv"]
    await road.open()
    await accepted(folder, "b.csv")

    assert watcher.end() == 0
    assert [name for name, _ in await jobs(connection)] == ["a.csv", "b.csv"]
    assert len(watcher.errors.read_text().splitlines()) == 2
    assert names(folder / FAILED) == []
    await road.close()


@pytest.mark.parametrize("at_last", [Cut.ANSWER, Cut.QUESTION])
async def test_answers_to_commit_that_are_lost_again_and_again_are_an_outage_like_any_other(
    watch: Watch, folder: Path, connection: asyncpg.Connection, database_url: str, at_last: Cut
) -> None:
    async with proxied(database_url) as (proxy, url):
        proxy.arm(*[Cut.QUESTION] * (BUDGETS[Fault.OUTAGE].tries - 1), at_last)
        watcher = watch(url=url)
        drop(folder, "a.csv", "name\nRed\n")
        await accepted(folder, "a.csv")
        assert watcher.end() == 0

    assert [name for name, _ in await jobs(connection)] == ["a.csv"]
    assert len(proxy.cuts) == BUDGETS[Fault.OUTAGE].tries
    first, last = watcher.errors.read_text().splitlines()
    assert "The answer to COMMIT was lost" in first
    assert "All is back" in last
