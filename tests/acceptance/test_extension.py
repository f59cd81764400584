"""A model and a job are added as files, and a worker uses them with no existing file changed."""

import asyncio
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from tests.workers import ROOT, environment, until, workers

pytestmark = pytest.mark.once

Sessions = async_sessionmaker[AsyncSession]
Row = sa.Row[*tuple[Any, ...]]
MODEL = '''
"""Gadgets: what heroes carry."""

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from db.columns import Identified, Name, SoftDeletable, Timestamped, unique_among_live


class GadgetBase(SQLModel):
    name: Name = Field(sa_type=sa.String(200))
    price: int = Field(ge=0)


class Gadget(SoftDeletable, Timestamped, GadgetBase, Identified, table=True):
    __table_args__ = (unique_among_live("name"),)


class GadgetCreate(GadgetBase):
    model_config = {"extra": "forbid"}


class GadgetPublic(GadgetBase):
    id: int


class GadgetUpdate(SQLModel):
    name: Name = Field(default=None)
'''
JOB = '''
"""Gadgets become cheaper or dearer."""

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from {model_module} import Gadget
from jobs import Outcome, Payload, job


class RepriceGadgets(Payload):
    factor: int


@job(timeout_s=30)
async def reprice_gadgets(session: AsyncSession, payload: RepriceGadgets) -> Outcome:
    """Multiply the price of every gadget."""
    changed = await session.execute(
        sa.update(Gadget).values(price=col(Gadget.price) * payload.factor).returning(col(Gadget.id))
    )
    return {{"gadgets": len(changed.all())}}
'''
CREATE_TABLE = """
import asyncio
from db.registry import discover_models
from worker.connection import open_engine
from worker.settings import load_settings

async def main():
    settings = load_settings()
    table = discover_models(settings.model_modules).get("gadget").table
    async with open_engine(settings) as engine, engine.begin() as connection:
        await connection.run_sync(table.create)

asyncio.run(main())
"""
ENQUEUE = """
import asyncio, importlib, json, sys
from worker.connection import open_engine, open_producer
from worker.settings import load_settings
from db.engine import make_sessions

async def main(module, payload_class, content):
    payload = getattr(importlib.import_module(module), payload_class)(**json.loads(content))
    settings = load_settings()
    async with open_engine(settings) as engine:
        async with open_producer(settings, make_sessions(engine)) as producer:
            print((await producer.enqueue(payload)).job_id)

asyncio.run(main(*sys.argv[1:]))
"""
GADGETS = '{"table": "gadget", "rows": [{"name": "Rope", "price": 2}, {"name": "x", "price": -1}]}'


@dataclass
class Tree:
    """A checkout, or a folder beside one, in which things were added."""

    folder: Path
    env: Mapping[str, str]
    sessions: Sessions
    job_module: str

    async def python(self, *words: str) -> str:
        """Run Python in the folder; its output. Fails with what it said when it fails."""
        ran = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, *words],
            cwd=self.folder,
            env=dict(self.env),
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout.strip()

    async def enqueue(self, module: str, payload_class: str, content: str) -> str:
        return await self.python("-c", ENQUEUE, module, payload_class, content)

    async def ended(self, job_id: str) -> Row | None:
        async with self.sessions() as session:
            query = "SELECT * FROM bulwark.job WHERE id = :id AND finished_at IS NOT NULL"
            return (await session.execute(sa.text(query), {"id": job_id})).one_or_none()

    async def gadgets(self) -> list[tuple[str, int]]:
        async with self.sessions() as session:
            rows = await session.execute(sa.text("SELECT name, price FROM gadget ORDER BY name"))
            return [(row.name, row.price) for row in rows]


async def work(tree: Tree, folder: Path) -> None:
    """Insert into the new table and run the new job on it, both by a worker process."""
    with workers(folder) as start:
        worker = start(tree.env)
        inserted = await carry_out(tree, "jobs.insert_rows", "InsertRows", GADGETS)
        assert inserted.outcome["verdicts"] == {"inserted": 1, "rejected": 1}
        repriced = await carry_out(tree, tree.job_module, "RepriceGadgets", '{"factor": 21}')
        assert repriced.outcome == {"gadgets": 1}
        assert worker.terminate() == 0
    assert await tree.gadgets() == [("Rope", 42)]


async def carry_out(tree: Tree, module: str, payload_class: str, content: str) -> Row:
    job_id = await tree.enqueue(module, payload_class, content)
    ended = await until(lambda: tree.ended(job_id), f"{payload_class} has ended")
    assert ended.state == "succeeded", ended.error
    return ended


def write(path: Path, source: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(source).lstrip())


def contents(folder: Path) -> dict[str, str]:
    """Digest by path of every source file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


@pytest.fixture
def beside(tmp_path: Path, database_url: str, redis_url: str, sessions: Sessions) -> Tree:
    """A folder outside the tree, whose modules are named in the settings."""
    folder = tmp_path / "beside"
    write(folder / "gadget_shop" / "__init__.py", "")
    write(folder / "gadget_shop" / "models.py", MODEL)
    write(
        folder / "gadget_shop" / "reprice_gadgets.py", JOB.format(model_module="gadget_shop.models")
    )
    env = environment(
        database_url,
        redis_url,
        model_modules="gadget_shop.models",
        job_modules="gadget_shop.reprice_gadgets",
    )
    paths = os.pathsep.join([env["PYTHONPATH"], str(folder)])
    return Tree(folder, {**env, "PYTHONPATH": paths}, sessions, "gadget_shop.reprice_gadgets")


async def test_modules_named_in_the_settings_are_used_by_a_worker(
    beside: Tree, tmp_path: Path
) -> None:
    await beside.python("-c", CREATE_TABLE)
    await work(beside, tmp_path)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the tree as it is."""
    folder = tmp_path / "copy"
    for name in ("db", "jobs", "worker", "alembic"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "alembic.ini", folder)
    return folder


async def test_files_dropped_into_the_tree_are_used_by_a_worker_and_no_other_file_changes(
    copied: Path, tmp_path: Path, database_url: str, redis_url: str, sessions: Sessions
) -> None:
    before = contents(copied)
    write(copied / "db" / "models" / "gadget.py", MODEL)
    write(copied / "jobs" / "reprice_gadgets.py", JOB.format(model_module="db.models.gadget"))
    env = {**environment(database_url, redis_url), "PYTHONPATH": str(copied)}
    tree = Tree(copied, env, sessions, "jobs.reprice_gadgets")
    assert await tree.python("-c", "import jobs; print(jobs.__file__)") == str(
        copied / "jobs" / "__init__.py"
    )

    await tree.python("-m", "alembic", "revision", "--autogenerate", "-m", "gadgets")
    await tree.python("-m", "worker.cli", "migrate")
    await tree.python("-m", "alembic", "check")
    await work(tree, tmp_path)

    after = contents(copied)
    assert {path: after.get(path) for path in before} == before
    added = sorted(set(after) - set(before))
    (migration,) = [path for path in added if path.startswith("alembic/versions/")]
    assert added == [migration, "db/models/gadget.py", "jobs/reprice_gadgets.py"]
