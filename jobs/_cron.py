"""The slots of a cron expression in an IANA time zone, as instants in UTC."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import takewhile
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from cronsim import CronSim, CronSimError

from jobs._errors import DeclarationError
from jobs._nearest import did_you_mean

FIRST_WINDOW = timedelta(minutes=1)
WINDOW_GROWTH = 4
_SOME_LEAP_YEAR = datetime(2000, 1, 1, tzinfo=UTC)


def check_expression(expression: str) -> None:
    """Raise DeclarationError unless the expression has slots; reads no time zone."""
    try:
        slot = next(CronSim(expression, _SOME_LEAP_YEAR), None)
    except CronSimError as error:
        raise DeclarationError(
            f"cron {expression!r} cannot be read ({str(error).lower()}); write minute, hour, day "
            "of the month, month and day of the week, as '30 3 * * MON-FRI'"
        ) from None
    if slot is None:
        raise DeclarationError(f"cron {expression!r} never comes; no year has such a day")


@dataclass(frozen=True)
class Cron:
    """An expression and the zone whose clock it is read by.

    What cronsim says of daylight saving is what Debian's cron does: an expression of certain
    hours comes once a day, just after the hour that is left out and in the first of the two that
    are alike; one whose minute or hour begins with a star, or that has seconds, goes by what the
    clock shows, and so comes in both or not at all.
    """

    expression: str
    time_zone: str

    @cached_property
    def zone(self) -> ZoneInfo:
        """The rules of the time zone. Raises DeclarationError where there is none of its name."""
        try:
            return ZoneInfo(self.time_zone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            near = did_you_mean(self.time_zone, available_timezones() - {"localtime"})
            hint = near if near.startswith("; did") else "; write one such as Europe/Berlin"
            raise DeclarationError(f"there is no time zone {self.time_zone!r}{hint}") from None

    def first_after(self, instant: datetime) -> datetime | None:
        """The next slot; None when there is none in fifty years."""
        return next(self._slots_after(instant), None)

    def latest(self, after: datetime, until: datetime, most: int) -> list[datetime]:
        """The last slots after one instant and not after another, at most so many, in order.

        However long that is, it is looked at only as far back as needed.
        """
        window = FIRST_WINDOW
        while True:
            start = max(after, until - window)
            slots = takewhile(lambda slot: slot <= until, self._slots_after(start))
            found = deque(slots, maxlen=most)
            if start == after or len(found) == most:
                return list(found)
            window *= WINDOW_GROWTH

    def _slots_after(self, instant: datetime) -> Iterator[datetime]:
        """Each slot once: by the clock on the wall two may fall together, or lie behind."""
        latest = instant
        for local in CronSim(self.expression, instant.astimezone(self.zone)):
            slot = local.astimezone(UTC)
            if slot > latest:
                latest = slot
                yield slot
