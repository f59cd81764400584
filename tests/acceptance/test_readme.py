"""What the README shows works as it stands there."""

import re
import shutil
from pathlib import Path

import pytest

from tests.workers import ROOT, environment, run_python, workers

pytestmark = pytest.mark.once

README = (ROOT / "README.md").read_text()
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", README, re.DOTALL))
PARTS = ("db", "jobs", "worker", "alembic", "alembic.ini")


def copy_of_the_project(folder: Path) -> Path:
    """The project's own files, with the README's two beside them and nothing else changed."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / part)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def test_the_model_and_the_job_of_the_readme_are_two_new_files_and_work(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    assert list(FILES) == ["db/models/gadget.py", "jobs/reprice_gadgets.py"]
    assert not any((ROOT / name).exists() for name in FILES)
    project = copy_of_the_project(tmp_path)
    env = environment(database_url, redis_url) | {"PYTHONPATH": str(project)}

    def run(*command: str) -> str:
        done = run_python("-m", *command, env=env, folder=project)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("alembic", "revision", "--autogenerate", "-m", "Add gadgets")
    run("worker.cli", "migrate")
    (project / "gadgets.csv").write_text("name,price\nlasso,3\ncape,5\nfree,-1\n")
    (project / "enqueue.py").write_text(
        "import asyncio\n"
        "from jobs import Producer, discover_jobs\n"
        "from jobs.reprice_gadgets import RepriceGadgets\n"
        "from worker.connection import open_engine\n"
        "from worker.settings import load_settings\n"
        "from db.engine import make_sessions\n"
        "async def main():\n"
        "    async with open_engine(load_settings()) as engine:\n"
        "        producer = Producer(make_sessions(engine), discover_jobs())\n"
        "        print((await producer.enqueue(RepriceGadgets(factor=2))).job_id)\n"
        "asyncio.run(main())\n"
    )
    (project / "prices.py").write_text(
        "import asyncio, asyncpg, os\n"
        "async def main():\n"
        "    url = os.environ['BULWARK_DATABASE_URL'].replace('+asyncpg', '')\n"
        "    connection = await asyncpg.connect(url)\n"
        "    for row in await connection.fetch('SELECT price FROM gadget ORDER BY name'):\n"
        "        print(row['price'])\n"
        "    await connection.close()\n"
        "asyncio.run(main())\n"
    )
    with workers(project) as start:
        start(env)
        report = run("worker.cli", "import", "gadget", "gadgets.csv", "--follow")
        assert re.search(r"inserted\s+2\b", report)
        assert re.search(r"rejected\s+1\b", report)
        job_id = run("enqueue").strip()
        assert "succeeded" in run("worker.cli", "job", job_id, "--follow")
    assert run("prices").split() == ["10", "6"]
