"""Which jobs there are: found by walking the package, collected by kind and by payload."""

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from jobs._declaration import Job, Payload
from jobs._errors import DeclarationError, UnknownJob
from jobs._nearest import did_you_mean
from jobs._schedule import Schedule


class Jobs:
    """All declared jobs by kind."""

    def __init__(self, declared: Iterable[Job[Any]]) -> None:
        self._by_kind: dict[str, Job[Any]] = {}
        for one in declared:
            if one.kind in self._by_kind:
                raise DeclarationError(
                    f"two jobs are named {one.kind!r}: in {self._by_kind[one.kind].run.__module__} "
                    f"and {one.run.__module__}; rename one"
                )
            self._by_kind[one.kind] = one
        self._by_payload: dict[type[Payload], Job[Any]] = {}
        for one in self._by_kind.values():
            first = self._by_payload.setdefault(one.payload, one)
            if first is not one:
                raise DeclarationError(
                    f"the jobs {first.kind!r} and {one.kind!r} both take a "
                    f"{one.payload.__name__}; give each a payload class of its own"
                )
        self.schedules = self._by_schedule()

    def _by_schedule(self) -> Mapping[str, tuple[Job[Any], Schedule]]:
        """All schedules by name, each with the job that it enqueues."""
        found: dict[str, tuple[Job[Any], Schedule]] = {}
        for one in self._by_kind.values():
            for schedule in one.schedules:
                if schedule.name in found:
                    raise DeclarationError(
                        f"two schedules are named {schedule.name!r}: of the jobs "
                        f"{found[schedule.name][0].kind} and {one.kind}; rename one"
                    )
                found[schedule.name] = (one, schedule)
        return found

    def __getitem__(self, kind: str) -> Job[Any]:
        try:
            return self._by_kind[kind]
        except KeyError:
            raise UnknownJob(f"unknown job {kind!r}{did_you_mean(kind, self._by_kind)}") from None

    def __contains__(self, kind: object) -> bool:
        return kind in self._by_kind

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_kind)

    def __len__(self) -> int:
        return len(self._by_kind)

    def of(self, payload: Payload) -> Job[Any]:
        """The job that takes this payload. Raises UnknownJob."""
        try:
            return self._by_payload[type(payload)]
        except KeyError:
            raise UnknownJob(
                f"no job takes a {type(payload).__name__}; is its module named in the settings?"
            ) from None


def discover_jobs(extra_modules: Sequence[str] = ()) -> Jobs:
    """Import every public module of the package `jobs`, and those named, and collect their jobs.

    Of a named package every public module is imported. Raises DeclarationError when a module
    cannot be imported, declares no job, or one that is not named like it.
    """
    names = [*_below(importlib.import_module("jobs"))]
    for extra in extra_modules:
        module = _imported(extra)
        names += _below(module) if hasattr(module, "__path__") else [extra]
    return Jobs(_job_of(_imported(name)) for name in dict.fromkeys(names))


def _below(package: ModuleType) -> list[str]:
    """The public modules of a package; none may take the place of a name that it gives out."""
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    if hidden := sorted({*names} & {*getattr(package, "__all__", ())}):
        raise DeclarationError(
            f"module {package.__name__}.{hidden[0]} hides a name of the package; rename it"
        )
    return [f"{package.__name__}.{name}" for name in sorted(names) if not name.startswith("_")]


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DeclarationError(f"the job module {name!r} cannot be imported: {error}") from error


def _job_of(module: ModuleType) -> Job[Any]:
    declared = [
        one
        for one in vars(module).values()
        if isinstance(one, Job) and one.run.__module__ == module.__name__
    ]
    name = module.__name__.rpartition(".")[2]
    if [one.kind for one in declared] != [name]:
        raise DeclarationError(
            f"module {module.__name__} must declare exactly one job, a function named {name!r}"
        )
    return declared[0]
