"""How a job is declared: a payload class and one async function, in a module named after it.

In jobs/rename_team.py, for example:

    class RenameTeam(Payload):
        team_id: int
        name: str

    @job(timeout_s=10)
    async def rename_team(session: AsyncSession, payload: RenameTeam) -> None: ...
"""

import inspect
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from typing import Any, Generic, TypedDict, TypeVar, Unpack, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict
from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger.job import PRIORITY_LIMIT, Claim
from jobs._errors import DeclarationError, Rejected
from jobs._nearest import did_you_mean
from jobs._run import ChunkedRun
from jobs._schedule import Schedule

DEFAULT_QUEUE = "default"
BULK_PRIORITY = -1
"""Of chunked jobs that declare none: a worker keeps some slots for what is not below 0."""
MAX_ATTEMPTS = 1000
MAX_TIMEOUT_S = 7 * 24 * 3600
_QUEUE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_RANGES = {
    "priority": (-PRIORITY_LIMIT, PRIORITY_LIMIT),
    "attempts": (1, MAX_ATTEMPTS),
    "max_attempts": (1, MAX_ATTEMPTS),
    "timeout_s": (1, MAX_TIMEOUT_S),
}


class Payload(BaseModel):
    """What a job is asked to do, as JSON in its row. Subclasses add the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


P = TypeVar("P", bound=Payload)
Outcome = Mapping[str, Any] | None
"""What a job reports when it has succeeded: kept as JSON in its row."""


BatchResults = Sequence[Outcome | Rejected]
"""What a batch form returns: for each order, in order, what it reports or why it is refused."""
BatchForm = Callable[[AsyncSession, Sequence[tuple[Any, Claim]]], Awaitable[BatchResults]]


class Options(TypedDict, total=False):
    """What a declaration may set for all jobs of its kind; each can be overridden when enqueued."""

    queue: str
    priority: int
    max_attempts: int
    timeout_s: int
    max_age: timedelta


@dataclass(frozen=True)
class Defaults:
    """The options of a kind.

    `max_age`, since the first start, bounds for how long TryLater may put a job off, and outages
    of PostgreSQL cost it no attempt.
    """

    queue: str = DEFAULT_QUEUE
    priority: int = 0
    max_attempts: int = 5
    timeout_s: int = 300
    max_age: timedelta = timedelta(days=1)


@dataclass(frozen=True)
class Job(Generic[P]):
    """A declared job. `chunked` jobs open one transaction per chunk, others are given theirs.

    One that is `claimed` is given its claim, too. `batch` does many at once, in one transaction.
    """

    kind: str
    payload: type[P]
    run: Callable[..., Awaitable[Outcome]]
    chunked: bool
    claimed: bool = False
    closing: Callable[[ChunkedRun, P], Awaitable[None]] | None = None
    batch: BatchForm | None = None
    defaults: Defaults = field(default_factory=Defaults)
    schedules: tuple[Schedule, ...] = ()


def job(
    *,
    batch: BatchForm | None = None,
    schedules: Sequence[Schedule] = (),
    **options: Unpack[Options],
) -> Callable[
    [
        Callable[[AsyncSession, P], Awaitable[Outcome]]
        | Callable[[AsyncSession, P, Claim], Awaitable[Outcome]]
    ],
    Job[P],
]:
    """Declare a job that fits in one transaction.

    The function gets the open session, inside the fence; what it writes commits together with
    the job's end. It must not commit, and may run more than once. With a third parameter it gets
    its claim, in whose name the audit is written. `schedules` say when workers enqueue it.

    `batch` does the work of many jobs that wait, in one transaction: it gets each payload with its
    claim, and returns a result for each, of which a Rejected fails that job alone. Should it raise
    anything, all is rolled back and the jobs are run one by one.
    """

    def declare(run: Callable[..., Awaitable[Outcome]]) -> Job[P]:
        declared: Job[P] = _declare(run, schedules, chunked=False, options=options)
        if batch is not None:
            _check_batch(batch, declared)
        return replace(declared, batch=batch)

    return declare


def chunked_job(
    closing: Callable[[ChunkedRun, P], Awaitable[None]] | None = None,
    *,
    schedules: Sequence[Schedule] = (),
    **options: Unpack[Options],
) -> Callable[[Callable[[ChunkedRun, P], Awaitable[Outcome]]], Job[P]]:
    """Declare a job of many chunks, each committed in a transaction of its own with its receipt.

    `closing` is called when the job has failed for good, to commit the verdicts of what it did not
    reach; its own errors change nothing about how the job ended.
    """
    return lambda run: replace(
        _declare(run, schedules, chunked=True, options=options), closing=closing
    )


def _declare(
    run: Callable[..., Awaitable[Outcome]],
    schedules: Sequence[Schedule],
    *,
    chunked: bool,
    options: Options,
) -> Job[Any]:
    name = getattr(run, "__name__", repr(run))
    known = ["schedules", *(one.name for one in fields(Defaults))]
    for option in options:
        if option not in known:
            raise DeclarationError(
                f"job {name}: unknown option {option!r}{did_you_mean(option, known)}"
            )
    if problem := complaint(options):
        raise DeclarationError(f"job {name}: {problem}")
    if not inspect.iscoroutinefunction(run):
        raise DeclarationError(f"job {name}: it must be an `async def` function")
    hints = _parameters(run, name, most=2 if chunked else 3)
    return Job(
        name,
        hints[1],
        run,
        chunked,
        claimed=len(hints) == 3,
        defaults=Defaults(**({"priority": BULK_PRIORITY} if chunked else {}) | options),
        schedules=_scheduled(name, schedules, hints[1]),
    )


def _scheduled(
    name: str, schedules: Sequence[Schedule], payload: type[Payload]
) -> tuple[Schedule, ...]:
    """The schedules with the payload that the job takes."""
    try:
        return tuple(one.with_payload_of(payload) for one in schedules)
    except DeclarationError as error:
        raise DeclarationError(f"job {name}: {error}") from None


def _check_batch(batch: Callable[..., Any], declared: Job[Any]) -> None:
    place = f"job {declared.kind}: its batch form"
    if not inspect.iscoroutinefunction(batch):
        raise DeclarationError(f"{place} must be an `async def` function")
    found = _annotations(batch, declared.kind)
    orders = found[1] if len(found) == 2 else None
    order = get_args(orders)[0] if get_origin(orders) is Sequence else None
    if get_origin(order) is not tuple or get_args(order) != (declared.payload, Claim):
        raise DeclarationError(
            f"{place} must take a session and a Sequence[tuple[{declared.payload.__name__}, Claim]]"
        )


def complaint(options: Mapping[str, Any]) -> str | None:
    """What is wrong with the values of options, in one sentence; those that are None are right."""
    for name, (least, most) in _RANGES.items():
        value = options.get(name)
        if value is not None and type(value) is not int:
            return f"{name} {value!r} is not a whole number"
        if value is not None and not least <= value <= most:
            return f"{name} {value} is out of range; use {least} to {most}"
    queue = options.get("queue")
    if queue is not None and not (isinstance(queue, str) and _QUEUE_NAME.fullmatch(queue)):
        return f"{queue!r} is not the name of a queue; use at most 63 letters, digits and _ . -"
    max_age = options.get("max_age")
    if max_age is not None and not (isinstance(max_age, timedelta) and max_age > timedelta(0)):
        return f"max_age {max_age!r} is not a timedelta above zero"
    return None


def _parameters(run: Callable[..., Any], name: str, *, most: int) -> list[Any]:
    """The annotations of its parameters, the second of which is its payload class."""
    found = _annotations(run, name)
    payload = found[1] if 2 <= len(found) <= most else None
    if not (isinstance(payload, type) and issubclass(payload, Payload)):
        count = "two" if most == 2 else "two or three"
        raise DeclarationError(
            f"job {name}: its second of {count} parameters must be annotated with a Payload class"
        )
    if len(found) == 3 and found[2] is not Claim:
        raise DeclarationError(f"job {name}: its third parameter must be annotated with Claim")
    return found


def _annotations(run: Callable[..., Any], name: str) -> list[Any]:
    try:
        hints = get_type_hints(run)
    except NameError as error:
        raise DeclarationError(
            f"job {name}: an annotation cannot be read ({error}); import or define it at the "
            "top of the module, outside `if TYPE_CHECKING`"
        ) from None
    return [hints.get(one) for one in inspect.signature(run).parameters]
