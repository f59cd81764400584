"""Values that nobody may see, where they are put, and everything that was told meanwhile."""

import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import asyncpg
import psutil
from typer.testing import CliRunner, Result

from tests.workers import WorkerProcess, run_bulwark, until
from worker.cli import app
from worker.exit_codes import ExitCode

CANARY = "KANARI"
"""The beginning of every value that must not be seen."""
DATABASE_PASSWORD = f"{CANARY}1 p@ss/w:rd#%é"
REDIS_PASSWORD = f"{CANARY}2 p@ss/w:rd#%é"
LISTEN_PASSWORD = f"{CANARY}0 p@ss/w:rd#%é"
WRONG_PASSWORD = f"{CANARY}3-wrong"
SEAL_KEYS = f"{CANARY}-signs-{'s' * 32} {CANARY}-signed-before-{'b' * 32}"
SHORT_KEY = f"{CANARY}-too-short"
STORE_SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAKNOWN",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}4",
    "AWS_SESSION_TOKEN": f"{CANARY}5",
    "AWS_ENDPOINT": "http://127.0.0.1:1",
    "AWS_ALLOW_HTTP": "true",
    "AWS_REGION": "eu-north-1",
}
TAKEN = f"{CANARY}6 is taken"
BROKEN_RULE = f"{CANARY}7 breaks a rule"
TRIGGERED = f"{CANARY}8 is refused by a trigger"
INLINE = f"{CANARY}9 stands in a payload"
RULES = f"""
    CREATE UNIQUE INDEX one_secret ON hero (secret_name);
    ALTER TABLE hero ADD CONSTRAINT no_broken_rule CHECK (secret_name NOT LIKE '%breaks a rule%');
    CREATE FUNCTION quote_it() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.secret_name LIKE '%by a trigger%' THEN
            RAISE EXCEPTION 'no hero may be called %', NEW.secret_name;
        END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER quote_it BEFORE INSERT OR UPDATE ON hero
        FOR EACH ROW EXECUTE FUNCTION quote_it();
    INSERT INTO hero (name, secret_name) VALUES ('Old', '{TAKEN}');
"""
ROWS = [
    f"Ann,{TAKEN},5,",
    f"Bob,{BROKEN_RULE},5,",
    f"Cid,{TRIGGERED},5,",
    f"Dan,{CANARY}a{'x' * 200},5,",
    f"Eve,{CANARY}b,minus one,",
    f"Fay,{CANARY}c,5,77",
    f"Gil,{CANARY}d,5,,too much",
    f"Hal,{CANARY}e\0,5,",
    f"Ida,{CANARY}f,5,",
]
LOOSE_ENDS = [b"Jim,KANARIg \xff,5,\n", b'Kay,"KANARIh never closed,5,\n']
SEEN = """
    SELECT 'job', to_jsonb(t) - 'payload' FROM bulwark.job t
    UNION ALL SELECT 'verdict', to_jsonb(t) - 'raw' FROM bulwark.verdict t
    UNION ALL SELECT 'audit', to_jsonb(t) - 'before_sensitive' FROM bulwark.audit t
    UNION ALL SELECT 'chunk', to_jsonb(t) FROM bulwark.chunk t
    UNION ALL SELECT 'worker', to_jsonb(t) FROM bulwark.worker t
    UNION ALL SELECT 'parked', to_jsonb(t) - 'message' FROM bulwark.parked t
    UNION ALL SELECT 'progress', to_jsonb(t) FROM bulwark.progress t
    UNION ALL SELECT 'idempotency', to_jsonb(t) FROM bulwark.idempotency t
    UNION ALL SELECT 'cancellation', to_jsonb(t) FROM bulwark.cancellation t
    UNION ALL SELECT 'depth_limit', to_jsonb(t) FROM bulwark.depth_limit t
    UNION ALL SELECT 'seal', to_jsonb(t) FROM bulwark.seal t
"""
ACTIVITY = "SELECT application_name, query FROM pg_stat_activity WHERE datname = current_database()"


@dataclass
class Town:
    """Servers with passwords, what has been said about them, and who is at work there."""

    env: dict[str, str]
    folder: Path
    connection: asyncpg.Connection
    said: list[str] = field(default_factory=list)
    processes: list[WorkerProcess] = field(default_factory=list)

    @property
    def log(self) -> str:
        """What the one worker has logged."""
        return (self.folder / "worker-0.log").read_text()

    async def bulwark(self, *words: str, **env: str) -> Result:
        """Run a command in this process, and keep what it says."""
        invoke = partial(CliRunner().invoke, app, words, env=self.env | env)
        done = await asyncio.to_thread(invoke)
        self.said += [done.stdout, done.stderr, repr(done.exception)]
        await self.look()
        return done

    async def done(self, *words: str) -> str:
        """What a command says that does what it is asked for."""
        done = await self.bulwark(*words)
        assert done.exit_code == 0, done.stderr
        return done.stdout

    async def refused_worker(self, **env: str) -> None:
        """Start a worker in a process of its own, which does not come up."""
        done = await asyncio.to_thread(
            run_bulwark, "worker", env=self.env | env, folder=self.folder
        )
        assert done.returncode in (ExitCode.UNREACHABLE, ExitCode.NOT_READY), done.stderr
        self.said += [done.stdout, done.stderr]

    async def accepted(self, *words: str, **env: str) -> str:
        """Enqueue a job; its id."""
        done = await self.bulwark(*words, "--json", **env)
        assert done.exit_code == 0, done.stderr
        return str(json.loads(done.stdout)["job_id"])

    async def look(self) -> None:
        """Keep what is seen at this moment of processes and of PostgreSQL's sessions."""
        rows = await self.connection.fetch(ACTIVITY)
        self.said += [f"{row['application_name']} {row['query']}" for row in rows]
        for process in self.processes:
            self.said.append(" ".join(psutil.Process(process.pid).cmdline()))

    async def ended(self, job_ids: Sequence[str]) -> dict[str, str]:
        """The states of these jobs, once all have ended."""
        ends = {"succeeded", "failed", "cancelled"}

        async def look() -> dict[str, str] | None:
            await self.look()
            rows = await self.connection.fetch(
                "SELECT id::text, state FROM bulwark.job WHERE id = ANY($1::uuid[])", job_ids
            )
            states = {row["id"]: row["state"] for row in rows}
            return states if {*states.values()} <= ends else None

        return await until(look, "all jobs have ended")


def slips(texts: Sequence[str]) -> Iterator[str]:
    """Where a canary is seen, with some text around it; quoted as in a URL, too."""
    for text in texts:
        for found in re.finditer(CANARY, text):
            yield text[max(0, found.start() - 300) : found.end() + 60]
