"""The slots of cron expressions, on the days when clocks are changed above all."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import DeclarationError
from jobs._cron import Cron, check_expression

BERLIN = "Europe/Berlin"
NEW_YORK = "America/New_York"
SPRING = {BERLIN: "2026-03-29", NEW_YORK: "2026-03-08"}
AUTUMN = {BERLIN: "2026-10-25", NEW_YORK: "2026-11-01"}


def instant(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def slots_of_three_days(cron: str, zone: str, middle: str) -> list[str]:
    """The slots of a day, of the one before and of the one after, as UTC."""
    noon = instant(middle) + timedelta(hours=12)
    found = Cron(cron, zone).latest(noon - timedelta(hours=36), noon + timedelta(hours=35), 100)
    return [slot.strftime("%d %H:%M") for slot in found]


@pytest.mark.parametrize(
    ("zone", "cron", "expected"),
    [
        (BERLIN, "30 2 * * *", ["28 01:30", "29 01:00", "30 00:30"]),
        (NEW_YORK, "30 2 * * *", ["07 07:30", "08 07:00", "09 06:30"]),
        (BERLIN, "0,30 2 * * *", ["28 01:00", "28 01:30", "29 01:00", "30 00:00", "30 00:30"]),
        (BERLIN, "30 3 * * *", ["28 02:30", "29 01:30", "30 01:30"]),
        (BERLIN, "0 30 2 * * *", ["28 01:30", "30 00:30"]),
        (BERLIN, "*/30 2 * * *", ["28 01:00", "28 01:30", "30 00:00", "30 00:30"]),
    ],
)
def test_a_slot_that_does_not_exist_comes_when_the_clock_has_been_put_forward(
    zone: str, cron: str, expected: list[str]
) -> None:
    assert slots_of_three_days(cron, zone, SPRING[zone]) == expected


@pytest.mark.parametrize(
    ("zone", "cron", "expected"),
    [
        (BERLIN, "30 2 * * *", ["24 00:30", "25 00:30", "26 01:30"]),
        (NEW_YORK, "30 1 * * *", ["31 05:30", "01 05:30", "02 06:30"]),
        (BERLIN, "30 3 * * *", ["24 01:30", "25 02:30", "26 02:30"]),
        (BERLIN, "0 30 2 * * *", ["24 00:30", "25 00:30", "25 01:30", "26 01:30"]),
    ],
)
def test_a_slot_that_exists_twice_comes_once_unless_it_goes_by_the_shown_time(
    zone: str, cron: str, expected: list[str]
) -> None:
    assert slots_of_three_days(cron, zone, AUTUMN[zone]) == expected


@pytest.mark.parametrize("zone", [BERLIN, NEW_YORK])
@pytest.mark.parametrize("days", [SPRING, AUTUMN])
def test_an_hourly_slot_comes_every_hour_whatever_the_clock_does(
    zone: str, days: dict[str, str]
) -> None:
    start = instant(days[zone]) - timedelta(minutes=1)
    found = Cron("0 * * * *", zone).latest(start, start + timedelta(hours=48), 100)
    assert found == [instant(days[zone]) + timedelta(hours=hour) for hour in range(48)]


@given(
    zone=st.sampled_from([BERLIN, NEW_YORK, "Australia/Lord_Howe", "Africa/Casablanca", "UTC"]),
    cron=st.sampled_from(
        ["30 2 * * *", "0,15,45 1-3 * * *", "*/20 2 * * *", "7 * * * *", "0 0 * * SUN"]
    ),
    day=st.sampled_from([*SPRING.values(), *AUTUMN.values(), "2026-04-05", "2026-06-01"]),
    before=st.timedeltas(timedelta(0), timedelta(days=1)),
    later=st.timedeltas(timedelta(0), timedelta(days=2)),
)
def test_what_is_due_does_not_depend_on_when_it_was_looked_at(
    zone: str, cron: str, day: str, before: timedelta, later: timedelta
) -> None:
    start = instant(day) - before
    end = start + timedelta(days=4)
    whole = Cron(cron, zone).latest(start, end, 10_000)
    tail = Cron(cron, zone).latest(start + later, end, 10_000)
    assert whole == sorted(set(whole))
    assert tail == [slot for slot in whole if slot > start + later]


def test_a_slot_of_the_first_of_two_like_hours_is_not_due_in_the_second() -> None:
    second_quarter_past_two = instant("2026-10-25 01:15")
    cron = Cron("30 2 * * *", BERLIN)
    assert cron.first_after(second_quarter_past_two) == instant("2026-10-26 01:30")


def test_only_the_last_slots_are_looked_at_after_a_long_time() -> None:
    end = instant("2026-06-01")
    found = Cron("* * * * * *", "UTC").latest(instant("1996-06-01"), end, 3)
    assert found == [end - timedelta(seconds=2), end - timedelta(seconds=1), end]


def test_a_slot_at_the_watermark_is_over_and_one_at_the_moment_is_due() -> None:
    first, second = instant("2026-06-01 03:00"), instant("2026-06-02 03:00")
    assert Cron("0 3 * * *", "UTC").latest(first, second, 9) == [second]
    assert Cron("0 3 * * *", "UTC").first_after(first) == second


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("0 25 * * *", "bad hour"),
        ("* * * *", "wrong number of fields"),
        ("every day", "wrong number of fields"),
        ("0 0 31 2 *", "bad day-of-month"),
    ],
)
def test_an_expression_that_cannot_be_read_says_what_is_wrong(
    expression: str, problem: str
) -> None:
    with pytest.raises(DeclarationError, match=problem):
        check_expression(expression)


@pytest.mark.parametrize(
    ("zone", "told"),
    [
        ("Europe/Berlim", "did you mean 'Europe/Berlin'"),
        ("../etc/passwd", "write one such as Europe/Berlin"),
        ("CEST", "there is no time zone 'CEST'"),
        ("", "write one such as"),
    ],
)
def test_a_time_zone_that_is_not_there_names_a_near_one(zone: str, told: str) -> None:
    with pytest.raises(DeclarationError, match=told):
        _ = Cron("0 3 * * *", zone).zone
