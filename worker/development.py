"""`bulwark dev`: servers and a worker in one terminal, with nothing to install or set."""

import os
import shlex
import subprocess
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from pydantic import SecretStr

from db.migrations import upgrade
from worker.child import STOP_MARGIN_S, stopping_like_ctrl_c, worker_process
from worker.embedded import embedded_postgres, embedded_valkey
from worker.settings import Servers, Settings, variable

FOLDER = Path(".bulwark")

Say = Callable[[str], None]


def run_development(settings: Settings, say: Say) -> int | None:
    """Run embedded servers, in place of those that the settings name none for, and a worker.

    The database stays in the folder .bulwark for the next time. Says the URLs of its own servers
    alone, since one that was given may hold a password. Returns None on Ctrl-C, with
    every process ended; otherwise, when the worker has ended, its exit code.
    """
    folder = FOLDER.absolute()
    with stopping_like_ctrl_c(), ExitStack() as stack:
        try:
            servers = _open_servers(stack, folder, settings)
            upgrade(servers.database_url)
            exports = _exports(servers)
            _introduce(_own(exports, settings), say)
            listening = _listening(servers, settings)
            return stack.enter_context(_worker(folder, settings, exports | listening)).wait()
        except KeyboardInterrupt:
            say("Stopping.")
            return None


def _open_servers(stack: ExitStack, folder: Path, settings: Settings) -> Servers:
    postgres, redis = _plain(settings.database_url), _plain(settings.redis_url)
    if postgres is None:
        postgres = stack.enter_context(embedded_postgres(folder)).url
    if redis is None:
        redis = stack.enter_context(embedded_valkey(folder)).url
        if settings.redis_password is not None:  # which is that of another server
            redis = redis.replace("://", "://:@")
    return Servers(postgres, redis)


def _introduce(exports: Mapping[str, str], say: Say) -> None:
    if exports:
        say("In other terminals:\n")
        for name, value in exports.items():
            say(f"export {name}={shlex.quote(value)}")
        say("")
    say("The worker starts. Ctrl-C ends everything; the database stays for the next time.")


def _exports(servers: Servers) -> dict[str, str]:
    return {variable(name): value for name, value in servers._asdict().items()}


def _own(exports: Mapping[str, str], settings: Settings) -> dict[str, str]:
    """Those of the servers that were started here, because the settings name none."""
    given = {variable(name) for name in Servers._fields if getattr(settings, name) is not None}
    return {name: value for name, value in exports.items() if name not in given}


def _listening(servers: Servers, settings: Settings) -> dict[str, str]:
    """Have the worker hear of what SQL enqueues in the database that was started here."""
    own = settings.database_url is None and settings.listen_url is None
    return {variable("listen_url"): servers.database_url} if own else {}


def _worker(
    folder: Path, settings: Settings, exports: Mapping[str, str]
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    return worker_process(
        {**os.environ, **exports},
        pid_file=folder / "worker" / "worker.pid",
        stop_within_s=settings.shutdown_grace_s + STOP_MARGIN_S,
    )


def _plain(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
