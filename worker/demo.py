"""`bulwark demo`: an import whose worker is killed, and the proof that nothing was lost by it."""

import asyncio
import os
import subprocess
from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from pydantic import SecretStr
from rich.console import Console
from rich.text import Text

from db.ledger import audit
from db.ledger.job import State
from db.migrations import upgrade
from jobs._mapping import Request
from jobs.insert_rows import InsertRows
from worker.child import stopping_like_ctrl_c, worker_process
from worker.connection import Sessions, open_ledger, open_producer
from worker.demo_data import FAULTS, TEAMS, team_name, write_heroes
from worker.demo_proof import Check, audited_rows, plain, prove
from worker.display import Follower, following, grid, moment, show_job
from worker.embedded import Embedded, embedded_servers
from worker.import_command import Import, submit
from worker.listings import keys_text
from worker.reports import JobReport, each_verdict, watch
from worker.settings import PREFIX, Settings, variable
from worker.shutdown import interruptible

ROWS = 200_000
LEAST_ROWS = 5_000
CHUNKS = 40
MOST_CHUNK_ROWS = 5_000
KILL_AT = 0.4
"""The share of the input that is committed when the worker is killed."""
LOOK_INTERVAL_S = 0.03


def run_demo(rows: int, console: Console) -> bool:
    """Play the demo, and leave nothing behind. Returns whether the proof holds."""
    console.print("Starting PostgreSQL and Valkey in a temporary folder ...")
    with stopping_like_ctrl_c(), embedded_servers(durable=False) as servers:
        upgrade(servers.database_url)
        return asyncio.run(interruptible(_play(servers, rows, console)))


async def _play(servers: Embedded, rows: int, console: Console) -> bool:
    settings = _settings(servers)
    async with open_ledger(settings) as sessions:
        demo = _Demo(settings, sessions, servers.folder, console)
        with demo.worker() as first:
            await demo.import_teams()
            console.print(f"Making a file of {rows:,} heroes, 1 % of them bad ...")
            file = servers.folder / "heroes.csv"
            expected = await asyncio.to_thread(write_heroes, file, rows)
            job_id = await demo.submit_heroes(file, rows)
            report = await demo.follow_and_kill(job_id, first)
        show_job(console, report)
        await demo.show_rejects(job_id)
        await demo.show_audit(job_id)
        return demo.show_proof(await prove(sessions, report, rows, expected))


def _settings(servers: Embedded) -> Settings:
    """The settings of the demo, whatever the environment says."""
    return Settings.model_construct(
        database_url=SecretStr(servers.database_url), redis_url=SecretStr(servers.redis_url)
    )


@dataclass
class _Demo:
    settings: Settings
    sessions: Sessions
    folder: Path
    console: Console
    workers: int = 0

    @contextmanager
    def worker(self) -> Iterator[subprocess.Popen[bytes]]:
        """A worker as a process of its own, away from the environment's settings and any .env."""
        self.workers += 1
        home = self.folder / f"worker-{self.workers}"
        home.mkdir()
        pid_file = home / "worker.pid"
        environment = _environment(self.settings)
        with (
            (home / "log").open("wb") as log,
            worker_process(environment, pid_file=pid_file, folder=home, log=log) as process,
        ):
            self.console.print(f"Worker {self.workers} is process {process.pid}.")
            yield process

    async def import_teams(self) -> None:
        """The teams come from rows inside the payload, and must be there before the heroes."""
        payload = InsertRows(table="team", rows=[{"name": team_name(n)} for n in range(TEAMS)])
        async with open_producer(self.settings, self.sessions) as producer:
            accepted = await producer.enqueue(payload, actor="demo")
        async with self._watch(accepted.job_id) as reports:
            with following(self.console) as follower:
                async for report in reports:
                    follower.show(report, f"{TEAMS} teams")

    async def submit_heroes(self, file: Path, rows: int) -> UUID:
        """What `bulwark import hero FILE --map team=team.name` does."""
        chunk_rows = min(MOST_CHUNK_ROWS, rows // CHUNKS)
        asked = Import(
            "hero",
            file,
            Request({"team": "team.name"}, {}, {}, [], ignore_unknown=False),
            options={"chunk_rows": chunk_rows},
            terms={"actor": "demo"},
        )
        accepted = await submit(self.settings, self.sessions, asked)
        self.console.print(f"Accepted as job {accepted.job_id}: bulwark import hero {file.name}")
        return accepted.job_id

    async def follow_and_kill(self, job_id: UUID, first: subprocess.Popen[bytes]) -> JobReport:
        """Follow the job to its end; in the middle kill its worker and start another."""
        killed: UUID | None = None
        async with AsyncExitStack() as stack:
            reports = await stack.enter_async_context(self._watch(job_id))
            follower = stack.enter_context(following(self.console))
            async for report in reports:
                if killed is None and _is_middle(report):
                    killed = report.worker_id
                    first.kill()
                    first.wait()
                    self._tell_killed(report)
                    stack.enter_context(self.worker())
                self._show(follower, report, killed)
        return report

    def _tell_killed(self, report: JobReport) -> None:
        self.console.print(
            Text(f"Worker 1 was killed with SIGKILL after {report.tally.rows:,} rows.", "bold red")
        )
        limit_s = self.settings.lost_after_s
        self.console.print(f"Once it has been silent for {limit_s:.0f} s its job is taken back.")

    def _show(self, follower: Follower, report: JobReport, killed: UUID | None) -> None:
        if killed is None:
            follower.show(report, "worker 1 imports")
        elif report.state == State.RUNNING and report.worker_id == killed:
            follower.show(report, f"worker 1 is silent for {report.silent_s or 0.0:.0f} s")
        else:
            follower.show(report, "worker 2 goes on")

    async def show_rejects(self, job_id: UUID) -> None:
        """The first rejects: one of each kind, since the kinds take turns."""
        names = ("line", "column", "code", "reason")
        rows = [
            (one.line, one.column or "", one.code, one.message)
            async for one in each_verdict(self.sessions, job_id, len(FAULTS))
        ]
        self._heading("Some rejects (bulwark rejects)")
        self.console.print(grid(names, rows, right=names[:1]))

    async def show_audit(self, job_id: UUID) -> None:
        """The audit of a chunk, beside what the table holds in its range of keys."""
        async with self.sessions() as session:
            entries = await audit.read_entries(session, job_id=job_id, most=CHUNKS)
            entry = entries[len(entries) // 2]
            there = await audited_rows(session, entry)
        self._heading(f"The audit of chunk {entry['chunk_no']} (bulwark audit)")
        facts = [
            ("at", f"{moment(entry['at'])} UTC in transaction {entry['xid']}"),
            ("who", f"{entry['actor']}, by {entry['kind']} under claim {entry['claim_id']}"),
            ("what", f"{entry['action']} of {entry['rows']:,} rows into {entry['table_name']}"),
            ("keys", f"{keys_text(entry['keys'])}: the table has {there:,} rows there"),
        ]
        self.console.print(grid(("", ""), facts))

    def show_proof(self, checks: list[Check]) -> bool:
        """Print each check. Returns whether all hold."""
        self._heading("The proof")
        rows = [(_sign(one), one.what, plain(one.found), plain(one.wanted)) for one in checks]
        names = ("", "", "found", "expected")
        self.console.print(grid(names, rows, right=names[2:]))
        return all(check.holds for check in checks)

    def _heading(self, text: str) -> None:
        self.console.print()
        self.console.print(Text(text, style="bold"))

    def _watch(self, job_id: UUID) -> AbstractAsyncContextManager[AsyncGenerator[JobReport, None]]:
        lost_after_s = self.settings.lost_after_s
        return aclosing(watch(self.sessions, job_id, lost_after_s, LOOK_INTERVAL_S))


def _sign(check: Check) -> Text:
    return Text("ok", "green") if check.holds else Text("WRONG", "bold red")


def _is_middle(report: JobReport) -> bool:
    share = report.tally.bytes / report.input_bytes if report.input_bytes else 0.0
    return report.state == State.RUNNING and share >= KILL_AT


def _environment(settings: Settings) -> dict[str, str]:
    servers = settings.require_servers()
    own = {variable(name): value for name, value in servers._asdict().items()}
    others = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return {**others, **own}
