"""When jobs of a kind are enqueued by themselves: declared beside the job.

For example:

    @job(schedules=[Schedule(name="nightly_purge", cron="0 3 * * *", timezone="Europe/Berlin")])
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from typing import Any, Literal, Required, Self, TypedDict, Unpack, get_args

from pydantic import BaseModel, ValidationError

from jobs._cron import check_expression
from jobs._errors import DeclarationError
from jobs._nearest import did_you_mean
from jobs._problems import problems_of, said

Missed = Literal["skip", "once", "all"]
Overlap = Literal["skip", "queue"]
ON_TIME = timedelta(seconds=60)
"""A slot that is not later than this was not missed."""
MOST_AT_ONCE = 100
"""How many missed slots can be made up for, and how many are recorded."""
OVERRIDABLE = ("cron", "timezone", "missed", "most", "overlap", "payload", "enabled")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_CHOICES = {"missed": get_args(Missed), "overlap": get_args(Overlap)}
_TYPES = {"name": str, "cron": str, "timezone": str, "most": int, "enabled": bool}


class Options(TypedDict, total=False):
    """What a schedule may say."""

    name: Required[str]
    cron: Required[str]
    timezone: str
    missed: Missed
    most: int
    overlap: Overlap
    payload: BaseModel | Mapping[str, Any] | None
    off_until: str | None
    enabled: bool


@dataclass(frozen=True, init=False)
class Schedule:
    """Enqueues a job for each slot of a cron expression.

    `missed` is about the slots that passed while no worker was there: none is fired, `once` the
    latest, or `all`, of which the last `most`. `overlap` is about a slot whose predecessor's job
    has not ended: it is skipped, or its job queued behind. `off_until` names a setting that has to
    be given before the schedule is on. Every option but name and off_until can be overridden by
    the settings.
    """

    name: str
    cron: str
    timezone: str = "UTC"
    missed: Missed = "once"
    most: int = MOST_AT_ONCE
    overlap: Overlap = "skip"
    payload: BaseModel | Mapping[str, Any] | None = None
    off_until: str | None = None
    enabled: bool = True

    def __init__(self, **options: Unpack[Options]) -> None:
        given: Mapping[str, Any] = options
        _refuse_unknown(f"schedule {given.get('name', '')}".rstrip(), given, _names())
        for one in fields(self):
            if one.name in ("name", "cron") and one.name not in given:
                raise DeclarationError(f"a schedule needs a {one.name}, as Schedule(name=, cron=)")
            object.__setattr__(self, one.name, given.get(one.name, one.default))
        if problem := self._complaint():
            raise DeclarationError(f"schedule {self.name}: {problem}")
        try:
            check_expression(self.cron)
        except DeclarationError as error:
            raise DeclarationError(f"schedule {self.name}: {error}") from None

    def _complaint(self) -> str | None:
        """What is wrong with the values, in one sentence."""
        for name, wanted in _TYPES.items():
            if type(getattr(self, name)) is not wanted:
                return f"{name} {getattr(self, name)!r} is no {wanted.__name__}"
        if not _NAME.fullmatch(self.name):
            return "its name may have at most 63 letters, digits and _ . -"
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                return f"{name} cannot be {value!r}{did_you_mean(str(value), choices)}"
        if not 1 <= self.most <= MOST_AT_ONCE:
            return f"most {self.most} is out of range; use 1 to {MOST_AT_ONCE}"
        if self.missed == "all" and self.overlap == "skip":
            return "missed 'all' fires several jobs at once; it needs overlap 'queue'"
        return None

    def overridden(self, given: Mapping[str, Any]) -> Self:
        """The same schedule with what the settings say. Raises DeclarationError."""
        _refuse_unknown(f"schedule {self.name}", given, OVERRIDABLE)
        return replace(self, **given)

    def with_payload_of(self, payload: type[BaseModel]) -> Self:
        """The same schedule, its payload as the job takes it. Raises DeclarationError."""
        if isinstance(self.payload, payload):
            return self
        if isinstance(self.payload, BaseModel):
            raise DeclarationError(
                f"schedule {self.name}: its payload is a {type(self.payload).__name__}; the job "
                f"takes a {payload.__name__}"
            )
        try:
            return replace(self, payload=payload.model_validate(dict(self.payload or {})))
        except ValidationError as error:
            problem = problems_of(error)[0]
            place = ".".join(map(str, ("payload", *problem["loc"])))
            raise DeclarationError(f"schedule {self.name}: {place}: {said(problem)}") from None

    def to_fire(self, due: Sequence[datetime], now: datetime) -> Sequence[datetime]:
        """Which of the slots that are due are fired; the others were missed."""
        if self.missed == "all":
            return due[-self.most :]
        if self.missed == "skip" and now - due[-1] > ON_TIME:
            return []
        return due[-1:]


def _names() -> list[str]:
    return [one.name for one in fields(Schedule)]


def _refuse_unknown(place: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for option in given:
        if option not in known:
            raise DeclarationError(
                f"{place}: unknown option {option!r}{did_you_mean(option, known)}"
            )
