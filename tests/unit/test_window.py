"""The window of a purge: open from when it began until a time of the day, in local time."""

from datetime import UTC, datetime, timedelta

import pytest

from jobs._window import Until


def closed_for(until: str, began: str, now: str) -> timedelta | None:
    at, since = datetime.fromisoformat(now), datetime.fromisoformat(began)
    return Until.parse(until).closed_for(at, since)


@pytest.mark.parametrize(
    ("now", "hours"),
    [
        ("2026-06-01T01:00:00Z", None),
        ("2026-06-01T03:59:59Z", None),
        ("2026-06-01T04:00:00Z", 21.0),
        ("2026-06-01T13:00:00Z", 12.0),
        ("2026-06-02T00:30:00Z", 0.5),
        ("2026-06-02T01:00:00Z", None),
    ],
)
def test_it_is_closed_from_its_end_until_the_time_at_which_it_began(
    now: str, hours: float | None
) -> None:
    """It began at three in Berlin."""
    closed = closed_for("06:00 Europe/Berlin", "2026-06-01T01:00:00Z", now)
    assert closed == (None if hours is None else timedelta(hours=hours))


def test_it_may_last_over_midnight() -> None:
    began = "2026-06-01T22:00:00Z"
    assert closed_for("05:00", began, "2026-06-02T04:59:00Z") is None
    assert closed_for("05:00", began, "2026-06-02T05:00:00Z") == timedelta(hours=17)


@pytest.mark.parametrize(("day", "hours"), [("2026-03-28", 20), ("2026-10-24", 22)])
def test_on_a_day_on_which_the_clocks_change_it_opens_by_the_clock(day: str, hours: int) -> None:
    zone = Until.parse("06:00 Europe/Berlin").zone
    began = datetime.fromisoformat(f"{day}T03:00:00").replace(tzinfo=zone).astimezone(UTC)
    closed = Until.parse("06:00 Europe/Berlin").closed_for(began + timedelta(hours=3), began)
    assert closed == timedelta(hours=hours)


@pytest.mark.parametrize("text", ["", "6", "25:00", "06:00+01:00", "06:00 Berlin", "06:00 ../x"])
def test_what_is_no_time_of_the_day_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no time|no time zone|name of a zone"):
        Until.parse(text)
