"""A schedule is checked where it is declared, and overridden by settings."""

from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from jobs import DeclarationError, Job, Jobs, Payload, Schedule, job
from worker.schedule import plan_schedules
from worker.settings import Settings, SettingsError


class Chime(Payload):
    times: int = 1


class Toll(Payload):
    times: int = 1


NIGHTLY = Schedule(name="nightly", cron="0 3 * * *", timezone="Europe/Berlin")


def chime(schedules: Sequence[Schedule]) -> Job[Any]:
    @job(schedules=schedules)
    async def chime(session: AsyncSession, payload: Chime) -> None:
        """Never run here."""

    return chime


def toll(schedules: Sequence[Schedule]) -> Job[Any]:
    @job(schedules=schedules)
    async def toll(session: AsyncSession, payload: Toll) -> None:
        """Never run here."""

    return toll


def planned(schedule: Schedule, **settings: Any) -> Any:
    (plan,) = plan_schedules(Jobs([chime([schedule])]), Settings(**settings))
    return plan


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"crn": "0 3 * * *"}, "schedule nightly: unknown option 'crn'; did you mean 'cron'?"),
        ({"missed": "onec"}, "schedule nightly: missed cannot be 'onec'; did you mean 'once'?"),
        ({"overlap": "que"}, "overlap cannot be 'que'; did you mean 'queue'?"),
        ({"cron": "61 * * * *"}, "schedule nightly: cron '61 .*' cannot be read \\(bad minute\\)"),
        ({"cron": 5}, "cron 5 is no str"),
        ({"most": 0}, "most 0 is out of range; use 1 to 100"),
        ({"most": True}, "most True is no int"),
        ({"missed": "all"}, "needs overlap 'queue'"),
        ({"name": "a b"}, "its name may have at most 63 letters"),
    ],
)
def test_an_option_that_cannot_be_is_refused_where_it_is_declared(
    options: dict[str, Any], told: str
) -> None:
    with pytest.raises(DeclarationError, match=told):
        Schedule(**{"name": "nightly", "cron": "0 3 * * *"} | options)


def test_a_schedule_without_a_cron_says_so() -> None:
    with pytest.raises(DeclarationError, match="a schedule needs a cron"):
        Schedule(name="nightly")  # type: ignore[call-arg]  # this is what is tested


@pytest.mark.parametrize("payload", [None, {}, {"times": 1}, Chime()])
def test_the_payload_may_be_a_dict_or_an_instance(payload: Any) -> None:
    schedule = Schedule(name="nightly", cron="0 3 * * *", payload=payload)
    assert planned(schedule).payload == Chime()


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        ({"tims": 2}, "job chime: schedule nightly: payload.tims: Extra inputs"),
        ({"times": "x"}, "payload.times: Input should be a valid integer"),
        (Toll(), "its payload is a Toll; the job takes a Chime"),
    ],
)
def test_a_payload_that_the_job_does_not_take_is_refused(payload: Any, told: str) -> None:
    with pytest.raises(DeclarationError, match=told):
        chime([Schedule(name="nightly", cron="0 3 * * *", payload=payload)])


def test_two_schedules_of_one_name_fail_and_both_jobs_are_named() -> None:
    with pytest.raises(DeclarationError, match="'nightly': of the jobs chime and toll"):
        Jobs([chime([NIGHTLY]), toll([NIGHTLY])])


def test_a_schedule_is_overridden_by_the_settings() -> None:
    plan = planned(NIGHTLY, schedules={"nightly": {"cron": "0 5 * * *", "overlap": "queue"}})
    assert (plan.cron.expression, plan.cron.time_zone) == ("0 5 * * *", "Europe/Berlin")
    assert (plan.schedule.overlap, plan.is_on) == ("queue", True)


def test_the_payload_of_a_schedule_may_be_another_in_one_installation() -> None:
    plan = planned(NIGHTLY, schedules={"nightly": {"payload": {"times": 12}}})
    assert plan.payload == Chime(times=12)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"nigtly": {}}, "there is no schedule 'nigtly'; did you mean 'nightly'?"),
        ({"nightly": {"crn": ""}}, "unknown option 'crn'; did you mean 'cron'?"),
        ({"nightly": {"name": "x"}}, "unknown option 'name'"),
        ({"nightly": {"cron": "0 99 * * *"}}, "bad hour"),
        ({"nightly": {"timezone": "Mars"}}, "there is no time zone 'Mars'"),
        ({"nightly": {"enabled": "no"}}, "enabled 'no' is no bool"),
        ({"nightly": {"payload": {"times": "often"}}}, "nightly: payload.times: "),
    ],
)
def test_an_override_that_cannot_be_names_the_variable(given: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match="BULWARK_SCHEDULES: .*" + told.replace("?", "\\?")):
        planned(NIGHTLY, schedules=given)


@pytest.mark.parametrize("text", ["{", "[]", '{"nightly": 3}', "nightly"])
def test_overrides_that_are_no_json_of_objects_name_the_variable(text: str) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Settings(schedules=text)  # type: ignore[arg-type]  # as the environment gives it


def test_a_declared_time_zone_that_is_not_there_fails_at_the_start() -> None:
    with pytest.raises(DeclarationError, match="there is no time zone 'Mars'"):
        planned(Schedule(name="nightly", cron="0 3 * * *", timezone="Mars"))


def test_a_schedule_is_off_until_its_setting_is_given() -> None:
    schedule = Schedule(name="nightly", cron="0 3 * * *", off_until="redis_url")
    assert planned(schedule).off_because == "BULWARK_REDIS_URL is not set"
    assert planned(schedule, schedules={"nightly": {"enabled": True}}).is_on is False
    assert planned(schedule, redis_url="redis://localhost").is_on is True


def test_a_schedule_that_awaits_no_setting_there_is_fails_at_the_start() -> None:
    schedule = Schedule(name="nightly", cron="0 3 * * *", off_until="redis_ur")
    with pytest.raises(DeclarationError, match="no setting; did you mean 'redis_url'"):
        planned(schedule)


def test_a_schedule_is_switched_off_and_on_by_the_settings() -> None:
    off = planned(NIGHTLY, schedules={"nightly": {"enabled": False}})
    assert off.off_because == "it is not enabled"
    dormant = Schedule(name="nightly", cron="0 3 * * *", enabled=False)
    assert planned(dormant).is_on is False
    assert planned(dormant, schedules={"nightly": {"enabled": True}}).is_on is True
