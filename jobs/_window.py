"""A window of time: from when a job first began, in local time, until a time of the day."""

from dataclasses import dataclass
from datetime import datetime, time, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError


@dataclass(frozen=True)
class Until:
    """A time of the day in a zone, at which work stops to go on the next time."""

    at: time
    zone: ZoneInfo

    @classmethod
    def parse(cls, text: str) -> "Until":
        """Of a form such as 06:00 Europe/Berlin; UTC without a zone. Raises ValueError."""
        clock, _, zone = text.strip().partition(" ")
        try:
            at = time.fromisoformat(clock)
        except ValueError:
            raise ValueError(f"{clock!r} is no time of the day such as 06:00") from None
        if at.tzinfo is not None:
            raise ValueError(f"write {text!r} as 06:00 Europe/Berlin, with the name of a zone")
        try:
            return cls(at, ZoneInfo(zone.strip() or "UTC"))
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"there is no time zone {zone.strip()!r}") from None

    def closed_for(self, now: datetime, began: datetime) -> timedelta | None:
        """How long it is until the window opens again; None while it is open.

        It opens at the time of the day at which the job first began.
        """
        local, opens = now.astimezone(self.zone), began.astimezone(self.zone).time()
        since_opening = _after(opens, local.time())
        if since_opening < (_after(opens, self.at) or timedelta(days=1)):
            return None
        next_day = local.date() + timedelta(days=local.time() >= opens)
        opening = datetime.combine(next_day, opens, self.zone)
        return max(opening.timestamp() - now.timestamp(), 1.0) * timedelta(seconds=1)


def _after(start: time, end: time) -> timedelta:
    """How long it is by the clock on the wall from one time to the next that is like the other."""
    day = datetime(2000, 1, 1)  # noqa: DTZ001 - any day without a change of the clocks
    span = datetime.combine(day, end) - datetime.combine(day, start)
    return span % timedelta(days=1)
