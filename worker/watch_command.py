"""Watching a folder: every file that arrives becomes one import, and bad ones are put aside."""

import asyncio
import hashlib
import json
import signal
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import sqlalchemy as sa
import typer

from db.errors import UnknownModel
from db.ledger.job import State, job
from db.registry import discover_models
from db.retry import DATABASE_ERRORS, is_outage
from jobs._errors import InputError, JobError
from jobs._producer import Enqueued, new_job_id
from worker.connection import Sessions, open_ledger
from worker.display import say, to_json
from worker.exit_codes import BadInput, ExitCode, explain
from worker.import_command import Import, check_wishes, submit
from worker.settings import Settings
from worker.shutdown import cancel_until_done
from worker.watched_folder import FolderAway, NotTaken, Taken, WatchedFolder, readable

_FAILED = (State.FAILED, State.CANCELLED)


@dataclass(frozen=True)
class Told:
    """What became of one file: a job, or the reason why there is none.

    `created` is false when the file led to a job that was there before, `left` is true when it
    could not be taken and lies where it was.
    """

    file: str
    job_id: UUID | None = None
    created: bool = False
    reason: str | None = None
    left: bool = False


@dataclass(frozen=True)
class Watching:
    """What to do with the files of a folder; `asked.file` stands for each of them."""

    folder: Path
    asked: Import
    interval_s: float
    once: bool


async def watch_folder(
    settings: Settings,
    watching: Watching,
    tell: Callable[[Told], None],
    remark: Callable[[str], None],
) -> ExitCode:
    """Import what arrives until SIGTERM or SIGINT, or with `once` what is there.

    Raises BadInput at once when no file could be imported so.
    """
    model = discover_models(settings.model_modules).get(watching.asked.model)
    watching = replace(watching, asked=replace(watching.asked, model=model.name))
    _check(watching)
    watcher = _Watcher(settings, watching, tell, remark)
    task = asyncio.create_task(watcher.run())
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    task.add_done_callback(lambda _: ended.set())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    await ended.wait()
    await cancel_until_done(task)
    if not task.cancelled():
        task.result()
    return ExitCode.BAD_INPUT if watching.once and watcher.failed else ExitCode.OK


def _check(watching: Watching) -> None:
    """Refuse what would be wrong with every file."""
    asked = watching.asked
    if asked.in_place:
        raise BadInput("--watch moves the files it imports, so --in-place cannot go with it.")
    if asked.terms.get("idempotency_key") is not None:
        raise BadInput("--watch gives each file a key of its own; leave --idempotency-key out.")
    if not watching.folder.is_dir():
        raise BadInput(f"There is no folder {watching.folder} to watch.")
    check_wishes(asked)
    WatchedFolder(watching.folder).prepare()


class _Watcher:
    def __init__(
        self,
        settings: Settings,
        watching: Watching,
        tell: Callable[[Told], None],
        remark: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._watching = watching
        self._folder = WatchedFolder(watching.folder)
        self._report = tell
        self._remark = remark
        self._away = False
        self._is_unread = False
        self._stuck: set[str] = set()
        self.failed = 0

    async def run(self) -> None:
        """Look again and again; what is away for a while is waited for, but not with `once`."""
        while True:
            try:
                await self._run()
                return
            except (FolderAway, *DATABASE_ERRORS) as error:
                failure = explain(error)
                if failure is None or self._is_unread or self._watching.once:
                    raise
                if not _comes_back(error):
                    raise
                self._say_away(failure.sentence)
            await asyncio.sleep(self._watching.interval_s)  # nothing tells that it is back

    async def _run(self) -> None:
        self._folder.prepare()
        async with open_ledger(self._settings) as sessions:
            await self._look(sessions)
            self._say_back()
            if self._watching.once:
                await asyncio.sleep(self._watching.interval_s)  # to see what is still written to
                await self._look(sessions)
                return
            while True:
                await asyncio.sleep(self._watching.interval_s)  # shared folders give no sign
                await self._look(sessions)

    async def _look(self, sessions: Sessions) -> None:
        with closing(self._folder.left()) as left:
            for taken in left:
                await self._import(sessions, taken)
        settled = self._folder.settled()
        self._stuck.intersection_update(settled)
        for name in settled:
            try:
                with self._folder.take(name, new_job_id()) as mine:
                    if mine is not None:
                        await self._import(sessions, mine)
            except NotTaken as error:
                self._leave(name, str(error))

    async def _import(self, sessions: Sessions, taken: Taken) -> None:
        try:
            accepted = await self._accept(sessions, taken)
        except (BadInput, JobError, UnknownModel, OSError) as error:
            if _comes_back(error):
                raise
            self._put_aside(taken, " ".join(str(error).split()))
        else:
            self._folder.accept(taken)
            self._tell(Told(taken.name, accepted.job_id, accepted.job_id == taken.job_id))

    def _leave(self, name: str, reason: str) -> None:
        """Tell of a file that stays where it is, but not at every look."""
        if name not in self._stuck:
            self._stuck.add(name)
            self.failed += 1
            self._tell(Told(readable(name), reason=reason, left=True))

    def _put_aside(self, taken: Taken, reason: str) -> None:
        if not taken.path.exists():
            return  # another watcher has done it
        self._folder.fail(taken, reason)
        self.failed += 1
        self._tell(Told(taken.name, reason=reason))

    async def _accept(self, sessions: Sessions, taken: Taken) -> Enqueued:
        """The one job of this file, made now or before.

        Its id makes it one, whoever makes it and how long ago; its key makes a file that is sent
        again lead to the job of the first, unless that has failed.
        """
        if await _state(sessions, taken.job_id) is not None:
            return Enqueued(taken.job_id, False)
        first_key = key = await asyncio.to_thread(_key, self._watching.asked, taken)
        while True:
            asked = replace(
                self._watching.asked,
                file=taken.path,
                terms={**self._watching.asked.terms, "idempotency_key": key},
                job_id=taken.job_id,
            )
            accepted = await submit(self._settings, sessions, asked)
            if accepted.created or await _state(sessions, accepted.job_id) not in _FAILED:
                return accepted
            key = f"{first_key}:{accepted.job_id}"

    def _tell(self, told: Told) -> None:
        try:
            self._report(told)
        except BrokenPipeError:  # which of a connection to PostgreSQL would be an outage
            self._is_unread = True
            raise

    def _say_away(self, reason: str) -> None:
        if not self._away:
            self._remark(f"{reason} It is tried again every {self._watching.interval_s:g} s.")
        self._away = True

    def _say_back(self) -> None:
        if self._away:
            self._remark("All is back, and the watch goes on.")
        self._away = False


async def _state(sessions: Sessions, job_id: UUID) -> State | None:
    async with sessions() as session:
        found = await session.scalar(sa.select(job.c.state).where(job.c.id == job_id))
        return None if found is None else State(found)


def _comes_back(error: Exception) -> bool:
    """Whether to wait for what is away is enough.

    When an answer to COMMIT is lost, the file stays taken, and the id of its job tells later.
    """
    return isinstance(error, FolderAway) or is_outage(error)


def _key(asked: Import, taken: Taken) -> str:
    """The idempotency key of a file: its name, its content, and what is to be done with it."""
    try:
        with taken.path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"The file {taken.name} cannot be read: {error.strerror}.") from None
    work: dict[str, Any] = asdict(replace(asked, file=Path(taken.path.name), terms={}))
    text = json.dumps([content, work], default=str, sort_keys=True)
    return f"watch:{hashlib.sha256(text.encode()).hexdigest()}"


def tell_file(told: Told, *, as_json: bool) -> None:
    """Say what became of a file, in one line."""
    if as_json:
        typer.echo(to_json(vars(told)))
    elif told.left:
        say(f"{told.file} is left where it is: {told.reason}")
    elif told.job_id is None:
        say(f"{told.file} is put aside: {told.reason}")
    elif told.created:
        say(f"{told.file} is accepted as job {told.job_id}.")
    else:
        say(f"{told.file} was accepted before, as job {told.job_id}; it is not imported again.")
