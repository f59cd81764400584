"""The folder of embedded servers, which is tidied up even when its owner is killed."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

POSTGRES_PORT = 5432
"""Only part of the socket's name: PostgreSQL does not listen on TCP."""
_SHORT_FOLDER = "/tmp"  # noqa: S108 - the folders made in it are unique and closed to others
_MEMORY = "/dev/shm"  # noqa: S108 - as above
_LEAST_MEMORY_BYTES = 4 * 1024**3
_MAX_SOCKET_PATH_BYTES = 103  # sun_path holds 104 bytes on macOS and 108 on Linux, one is the end

# Reads one line when its owner has tidied up. End of file means that the owner died: then it stops
# whatever still has a pid file in the first folder, and removes the folders named after it.
_GUARD = """
read -r _ && exit
for pid_file in "$1"/*/*.pid; do
    pid=$(head -n 1 "$pid_file" 2>/dev/null) || continue
    kill -INT "$pid" 2>/dev/null
    polls=600
    while [ -e "$pid_file" ] && kill -0 "$pid" 2>/dev/null && [ $((polls -= 1)) -gt 0 ]; do
        sleep 0.05
    done
done
shift
rm -rf -- "$@"
"""


@dataclass(frozen=True)
class Home:
    """A folder for servers, and a folder whose path is short enough for a socket."""

    folder: Path
    sockets: Path


@contextmanager
def open_home(folder: Path | None, *, in_memory: bool = False) -> Iterator[Home]:
    """Give the servers their folder, and take away what was temporary when the block ends.

    A temporary one may be in memory, where that has room.
    """
    temporary: list[Path] = []
    if folder is None:
        parent = _MEMORY if in_memory and has_memory() else tempfile.gettempdir()
        folder = _temporary_folder(parent, temporary)
    folder.mkdir(parents=True, exist_ok=True)
    home = folder.resolve()
    sockets = home if _fits_socket(home) else _temporary_folder(_SHORT_FOLDER, temporary)
    with _guard(home, temporary):
        try:
            yield Home(home, sockets)
        finally:
            for path in temporary:
                shutil.rmtree(path)


@contextmanager
def _guard(home: Path, temporary: list[Path]) -> Iterator[None]:
    """Have a shell do the tidying if this process is killed before it can."""
    command = ["/bin/sh", "-c", _GUARD, "sh", str(home), *map(str, temporary)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as guard:
        try:
            yield
        finally:
            guard.communicate(b"done\n")


def _temporary_folder(parent: str, temporary: list[Path]) -> Path:
    path = Path(tempfile.mkdtemp(prefix="bulwark-", dir=parent)).resolve()
    temporary.append(path)
    give_to_postgres(path)
    return path


def has_memory() -> bool:
    """Whether this system has a folder in memory with room for a test run."""
    return Path(_MEMORY).is_dir() and shutil.disk_usage(_MEMORY).free >= _LEAST_MEMORY_BYTES


def _fits_socket(folder: Path) -> bool:
    longest = folder / f".s.PGSQL.{POSTGRES_PORT}.lock"
    return len(os.fsencode(longest)) <= _MAX_SOCKET_PATH_BYTES


def give_to_postgres(folder: Path) -> None:
    if os.geteuid() == 0:
        user = pwd.getpwnam("nobody")
        os.chown(folder, user.pw_uid, user.pw_gid)
