"""Bring a database to a revision of its migrations, and tell whether it is at the newest."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from db.errors import BulwarkError

_one_at_a_time = threading.Lock()  # alembic keeps the running migration in module globals


def upgrade(
    database_url: str, revision: str = "head", *, lock_timeout_ms: int | None = None
) -> None:
    """Apply what is missing up to the revision; at the revision already, change nothing.

    Waits for another process that migrates the same database. Blocks the caller, and may be called
    where an event loop runs; connect to PostgreSQL itself, not to PgBouncer.
    """
    _run(command.upgrade, configuration(database_url, lock_timeout_ms), revision)


def downgrade(database_url: str, revision: str, *, lock_timeout_ms: int | None = None) -> None:
    """Undo the migrations after the revision, newest first; `base` undoes all, with the data."""
    _run(command.downgrade, configuration(database_url, lock_timeout_ms), revision)


@dataclass(frozen=True)
class Revisions:
    """Where a database stands, None where it was never migrated, and what this program brings.

    A newer program may have migrated the database: its migrations only add, so that this one goes
    on working there.
    """

    current: str | None
    head: str
    is_newer: bool

    @property
    def suffices(self) -> bool:
        """Whether this program can work on the database."""
        return self.current == self.head or self.is_newer


def read_revisions(connection: sa.Connection) -> Revisions:
    """Compare the database with the migrations that this program brings along."""
    scripts = ScriptDirectory.from_config(_scripts())
    head = scripts.get_current_head()
    if head is None:
        raise BulwarkError(f"There are no migrations beside {_ini()}; restore alembic/versions.")
    current = MigrationContext.configure(connection).get_current_revision()
    known = {script.revision for script in scripts.walk_revisions()}
    return Revisions(current, head, is_newer=current is not None and current not in known)


def configuration(database_url: str, lock_timeout_ms: int | None = None) -> Config:
    """For alembic's own commands, from any folder; leaves logging and sys.path as they are.

    Nothing is read from the environment: to run migrations takes no models but the package's.
    """
    config = _scripts()
    config.attributes["database_url"] = database_url
    config.attributes["model_modules"] = ()
    if lock_timeout_ms is not None:
        config.attributes["lock_timeout_ms"] = lock_timeout_ms
    return config


def _scripts() -> Config:
    config = Config(_ini())
    config.set_main_option("prepend_sys_path", "")
    return config


def _ini() -> Path:
    """Beside the packages in a checkout and in the image, and where pip puts it otherwise."""
    beside = Path(__file__).resolve().parent.parent / "alembic.ini"
    places = [beside, *_installed("alembic.ini")]
    for place in places:
        if place.exists():
            return place
    raise BulwarkError(
        f"The migrations are missing: none of {', '.join(map(str, places))} is there."
    )


def _installed(name: str) -> list[Path]:
    try:
        files = metadata.files("bulwark-worker") or []
    except metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())).resolve() for file in files if file.name == name]


def _run(step: Callable[[Config, str], object], config: Config, revision: str) -> None:
    """Take the step, in a thread of its own where an event loop runs: alembic starts another."""
    with _one_at_a_time:
        if not _in_event_loop():
            step(config, revision)
            return
        with ThreadPoolExecutor(1, "migration") as thread:
            thread.submit(step, config, revision).result()


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
