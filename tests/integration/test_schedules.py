"""Each slot is fired once, by whichever worker, judged by PostgreSQL's clock."""

import asyncio
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from structlog.testing import capture_logs

from db.engine import PoolProfile, create_engine, make_sessions
from db.ledger import schedule as ledger
from db.ledger import worker
from db.ledger.schedule import Slot
from db.transaction import transaction
from jobs import Jobs, Payload, Producer, Schedule, job
from jobs._firing import Plan, fire_due, fire_now
from tests.command_line import Cli, make_cli, sentence
from tests.proxy import Cut, proxied
from tests.stage import Stage
from tests.workers import until
from worker.rescue import Rescue
from worker.schedule import Scheduler, plan_schedules
from worker.settings import Settings
from worker.shutdown import cancel_until_done

Sessions = async_sessionmaker[AsyncSession]
NOON = datetime(2020, 6, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
EVERY_MINUTE: Mapping[str, Any] = {"name": "bell", "cron": "* * * * *"}
ALL: Mapping[str, Any] = {"missed": "all", "overlap": "queue"}


class Chime(Payload):
    """How often to chime."""

    times: int = 1


class Post:
    """A watchman's post: one or more schedules of one job, and a look at what was fired."""

    def __init__(self, sessions: Sessions, stage: Stage, *schedules: Schedule) -> None:
        @job(schedules=schedules)
        async def chime(session: AsyncSession, payload: Chime) -> None:
            """Never run here."""

        self.sessions = sessions
        self.stage = stage
        self.jobs = Jobs([chime])
        self.plans = plan_schedules(self.jobs, Settings())
        self.producer = Producer(sessions, self.jobs)

    @property
    def plan(self) -> Plan:
        return self.plans[0]

    async def watchman(self) -> Scheduler:
        """The scheduler of a worker that has just started."""
        worker_id = uuid4()
        await transaction(
            self.sessions, lambda s: worker.register(s, worker_id, "here", 1, ["default"]), name="t"
        )
        return Scheduler(worker_id, self.sessions, self.producer, self.plans)

    async def begin(self, watermark: datetime) -> None:
        """Declare the schedules as if they had last been seen to at this moment."""
        declared = [plan.declaration for plan in self.plans]
        await transaction(
            self.sessions, lambda s: ledger.declare(s, declared, uuid4()), name="test.declare"
        )
        await self.set_back(watermark)

    async def set_back(self, watermark: datetime) -> None:
        await self.stage.value("UPDATE bulwark.schedule SET watermark = $1", watermark)

    async def fire(
        self, now: datetime | None = None, sessions: Sessions | None = None
    ) -> list[Slot]:
        return await transaction(
            sessions or self.sessions,
            lambda session: fire_due(session, self.producer, self.plan, "a watchman", now=now),
            name="test.fire",
            receipted=True,
        )

    async def slots(self, name: str = "bell") -> list[dict[str, Any]]:
        query = "SELECT * FROM bulwark.slot WHERE schedule = :name ORDER BY at"
        async with self.sessions() as session:
            rows = await session.execute(sa.text(query), {"name": name})
            return [dict(row) for row in rows.mappings()]

    async def outcomes(self, name: str = "bell") -> list[str]:
        return [slot["outcome"] for slot in await self.slots(name)]

    async def jobs_made(self) -> int:
        count: int = await self.stage.value("SELECT count(*) FROM bulwark.job")
        return count

    async def end_jobs(self) -> None:
        await self.stage.value("UPDATE bulwark.job SET state = 'cancelled'")


@pytest.fixture
def post(sessions: Sessions, stage: Stage) -> Post:
    return Post(sessions, stage, Schedule(**EVERY_MINUTE))


async def now_of(stage: Stage) -> datetime:
    now: datetime = await stage.value("SELECT clock_timestamp()")
    return now


async def the_hour_is_not_about_to_turn(stage: Stage) -> datetime:
    """The last full hour, at a moment when the next is two seconds away at least."""

    async def far_enough() -> datetime | None:
        now = await now_of(stage)
        return now if now.minute < 59 or now.second < 58 else None

    now = await until(far_enough, "the hour has turned")
    return now.replace(minute=0, second=0, microsecond=0)


async def the_minute_is_not_about_to_turn(stage: Stage) -> None:
    async def far_enough() -> bool:
        return (await now_of(stage)).second < 50

    await until(far_enough, "the minute has turned")


# One slot


async def test_a_slot_says_who_fired_it_how_late_and_which_job_it_became(
    sessions: Sessions, stage: Stage
) -> None:
    post = Post(sessions, stage, Schedule(**EVERY_MINUTE, payload={"times": 3}))
    await post.begin(NOON)
    await post.fire(NOON + MINUTE + timedelta(seconds=4))

    (slot,) = await post.slots()
    assert (slot["at"], slot["outcome"]) == (NOON + MINUTE, "fired")
    assert (slot["lag"], slot["fired_by"]) == (timedelta(seconds=4), "a watchman")
    row = await stage.row(slot["job_id"])
    assert (row["kind"], row["state"]) == ("chime", "queued")
    assert row["payload"] == '{"times": 3}'
    assert row["actor"] == "schedule:bell"
    assert row["correlation_id"] == "bell/2020-06-01T12:01:00+00:00"


async def test_a_slot_and_its_job_are_made_together_or_not_at_all(post: Post) -> None:
    await post.begin(NOON)
    async with post.sessions() as session:
        assert await fire_due(session, post.producer, post.plan, "me", now=NOON + MINUTE)
        await session.rollback()

    assert (await post.slots(), await post.jobs_made()) == ([], 0)
    assert len(await post.fire(NOON + MINUTE)) == 1


async def test_nothing_is_fired_before_its_time(post: Post) -> None:
    await post.begin(NOON)
    assert await post.fire(NOON + MINUTE - timedelta(microseconds=1)) == []
    assert len(await post.fire(NOON + MINUTE)) == 1


async def test_a_clock_that_is_put_back_fires_no_slot_again(post: Post) -> None:
    await post.begin(NOON)
    await post.fire(NOON + 2 * MINUTE)
    before = await post.slots()
    assert await post.fire(NOON + MINUTE) == []
    assert await post.fire(NOON + 2 * MINUTE) == []
    assert await post.slots() == before


# Several workers


@settings(
    max_examples=15,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # an example takes a database: no shrink
)
@given(rounds=st.lists(st.lists(st.integers(0, 20), min_size=2, max_size=6), max_size=4))
async def test_workers_that_race_fire_each_slot_once_and_leave_none_out(
    sessions: Sessions, stage: Stage, rounds: list[list[int]]
) -> None:
    post = Post(sessions, stage, Schedule(**EVERY_MINUTE, **ALL))
    await stage.value("TRUNCATE bulwark.slot, bulwark.schedule, bulwark.job")
    await post.begin(NOON)
    for minutes in rounds:
        await asyncio.gather(*(post.fire(NOON + minute * MINUTE) for minute in minutes))
    await post.fire(NOON + 20 * MINUTE)

    slots = await post.slots()
    assert [slot["at"] for slot in slots] == [NOON + n * MINUTE for n in range(1, 21)]
    assert len({slot["job_id"] for slot in slots}) == await post.jobs_made() == 20


async def test_a_worker_does_not_wait_for_one_that_is_at_it(post: Post) -> None:
    await post.begin(NOON)
    async with post.sessions() as session:
        assert await fire_due(session, post.producer, post.plan, "me", now=NOON + MINUTE)
        async with asyncio.timeout(5):
            assert await post.fire(NOON + MINUTE) == []
        await session.commit()
    assert await post.fire(NOON + MINUTE) == []
    assert await post.jobs_made() == 1


async def test_a_slot_whose_commit_got_lost_on_the_way_back_is_fired_once(
    post: Post, database_url: str
) -> None:
    await post.begin(NOON)
    async with proxied(database_url) as (proxy, url):
        engine = create_engine(url, profile=PoolProfile.LIGHT, application_name="test_schedules")
        proxy.arm(Cut.ANSWER)
        await post.fire(NOON + MINUTE, make_sessions(engine))
        assert proxy.cuts == [Cut.ANSWER]
        await engine.dispose()
    (slot,) = await post.slots()
    assert (slot["outcome"], await post.jobs_made()) == ("fired", 1)
    assert (await post.stage.row(slot["job_id"]))["next_ring_at"] is not None


async def test_what_is_fired_by_hand_is_fired_once_when_its_commit_got_lost_on_the_way_back(
    post: Post, database_url: str
) -> None:
    job_id = uuid4()
    async with proxied(database_url) as (proxy, url):
        engine = create_engine(url, profile=PoolProfile.LIGHT, application_name="test_schedules")
        proxy.arm(Cut.ANSWER)
        slot = await transaction(
            make_sessions(engine),
            lambda session: fire_now(session, post.producer, post.plan, "ann", job_id),
            name="test.run",
            receipted=True,
        )
        assert proxy.cuts == [Cut.ANSWER]
        await engine.dispose()
    (row,) = await post.slots()
    assert (row["at"], row["outcome"], row["job_id"]) == (slot.at, "manual", job_id)
    assert await post.jobs_made() == 1


# Slots that were missed

LATE = NOON + timedelta(minutes=50, seconds=-1)
"""Ten-minute slots have passed, and the last of them not just now."""


@pytest.mark.parametrize(
    ("policy", "outcomes"),
    [
        ({"missed": "skip"}, "missed missed missed missed"),
        ({"missed": "once"}, "missed missed missed fired"),
        ({**ALL}, "fired fired fired fired"),
        ({**ALL, "most": 2}, "missed missed fired fired"),
    ],
)
async def test_after_a_stop_the_missed_slots_are_skipped_or_made_up_for_as_declared(
    sessions: Sessions, stage: Stage, policy: dict[str, Any], outcomes: str
) -> None:
    post = Post(sessions, stage, Schedule(name="bell", cron="*/10 * * * *", **policy))
    await post.begin(NOON)
    await post.fire(LATE)

    assert await post.outcomes() == outcomes.split()
    assert [slot["at"] for slot in await post.slots()] == [
        NOON + timedelta(minutes=minutes) for minutes in (10, 20, 30, 40)
    ]
    assert await post.jobs_made() == outcomes.count("fired")
    assert await post.fire(LATE) == []


@pytest.mark.parametrize(
    ("cron", "late_s", "outcomes"),
    [
        ("0 * * * *", 60, ["fired"]),
        ("0 * * * *", 61, ["missed"]),
        ("*/30 * * * *", 60, ["missed", "fired"]),
    ],
)
async def test_a_slot_that_is_a_minute_late_was_not_missed(
    sessions: Sessions, stage: Stage, cron: str, late_s: int, outcomes: list[str]
) -> None:
    post = Post(sessions, stage, Schedule(name="bell", cron=cron, missed="skip"))
    await post.begin(NOON)
    await post.fire(NOON + timedelta(hours=1, seconds=late_s))
    assert await post.outcomes() == outcomes


async def test_of_a_year_of_missed_seconds_the_last_hundred_are_recorded(
    sessions: Sessions, stage: Stage
) -> None:
    post = Post(sessions, stage, Schedule(name="bell", cron="* * * * * *"))
    await post.begin(NOON - timedelta(days=365))
    await post.fire(NOON)
    slots = await post.slots()
    assert [slot["outcome"] for slot in slots] == ["missed"] * 99 + ["fired"]
    assert slots[-1]["at"] == NOON


async def test_a_worker_that_was_down_makes_up_for_what_it_missed_when_it_starts(
    sessions: Sessions, stage: Stage
) -> None:
    post = Post(sessions, stage, Schedule(name="bell", cron="0 * * * *"))
    hour = await the_hour_is_not_about_to_turn(stage)
    await post.begin(hour - timedelta(hours=3))
    with capture_logs() as logs:
        await (await post.watchman()).look_round()

    assert [(slot["at"], slot["outcome"]) for slot in await post.slots()] == [
        (hour - timedelta(hours=2), "missed"),
        (hour - timedelta(hours=1), "missed"),
        (hour, "fired"),
    ]
    told = {line["event"]: line for line in logs}
    assert told["schedule.missed"]["slots"] == 2
    assert told["schedule.missed"]["first"] == (hour - timedelta(hours=2)).isoformat()
    assert told["schedule.fired"]["slot"] == hour.isoformat()


# Slots that overlap


async def test_a_slot_whose_predecessor_still_runs_is_skipped_and_says_so(post: Post) -> None:
    await post.begin(NOON)
    await post.fire(NOON + MINUTE)
    await post.fire(NOON + 2 * MINUTE)
    assert await post.outcomes() == ["fired", "overlapped"]

    await post.end_jobs()
    await post.fire(NOON + 3 * MINUTE)
    assert await post.outcomes() == ["fired", "overlapped", "fired"]
    assert await post.jobs_made() == 2


async def test_jobs_that_may_queue_do_not_wait_for_each_other(
    sessions: Sessions, stage: Stage
) -> None:
    post = Post(sessions, stage, Schedule(**EVERY_MINUTE, overlap="queue"))
    await post.begin(NOON)
    for minutes in (1, 2, 3):
        await post.fire(NOON + minutes * MINUTE)
    assert await post.outcomes() == ["fired"] * 3


# Daylight saving


@pytest.mark.parametrize(
    ("zone", "cron", "day", "slots"),
    [
        ("Europe/Berlin", "30 2 * * *", "2026-03-28", ["28 01:30", "29 01:00", "30 00:30"]),
        ("Europe/Berlin", "30 2 * * *", "2026-10-24", ["24 00:30", "25 00:30", "26 01:30"]),
        ("America/New_York", "30 2 * * *", "2026-03-07", ["07 07:30", "08 07:00", "09 06:30"]),
        ("America/New_York", "30 1 * * *", "2026-10-31", ["31 05:30", "01 05:30", "02 06:30"]),
    ],
)
async def test_on_the_days_when_clocks_are_changed_a_daily_slot_is_fired_once(
    sessions: Sessions, stage: Stage, zone: str, cron: str, day: str, slots: list[str]
) -> None:
    daily = Schedule(name="bell", cron=cron, timezone=zone, overlap="queue", missed="skip")
    post = Post(sessions, stage, daily)
    midnight = datetime.fromisoformat(day).replace(tzinfo=UTC)
    await post.begin(midnight)
    for half_hours in range(1, 3 * 48):
        await post.fire(midnight + timedelta(minutes=30 * half_hours))

    assert [slot["at"].strftime("%d %H:%M") for slot in await post.slots()] == slots
    assert await post.outcomes() == ["fired"] * 3


# What is declared


async def redeclared(post: Post, **options: Any) -> Post:
    """The same schedule declared otherwise, by a worker that starts now."""
    await the_minute_is_not_about_to_turn(post.stage)
    other = Post(post.sessions, post.stage, Schedule(**{**EVERY_MINUTE, **options}))
    await (await other.watchman()).look_round()
    return other


@pytest.mark.parametrize(
    "change", [{"cron": "*/2 * * * *"}, {"timezone": "Asia/Tokyo"}, {"enabled": False}]
)
async def test_a_changed_declaration_starts_now_and_fires_nothing_that_was_missed(
    post: Post, change: dict[str, Any]
) -> None:
    started = await now_of(post.stage)
    await post.begin(NOON)
    other = await redeclared(post, **change)

    assert (await post.slots(), await post.jobs_made()) == ([], 0)
    assert await post.stage.value("SELECT watermark >= $1 FROM bulwark.schedule", started)
    assert await post.fire() == []
    assert other.plan.is_on == await post.stage.value("SELECT is_on FROM bulwark.schedule")


async def test_a_schedule_that_is_off_fires_nothing(sessions: Sessions, stage: Stage) -> None:
    post = Post(sessions, stage, Schedule(**EVERY_MINUTE, enabled=False))
    await post.begin(NOON)
    await (await post.watchman()).look_round()
    assert (await post.slots(), await post.jobs_made()) == ([], 0)


async def test_a_schedule_that_is_switched_on_again_starts_now(post: Post) -> None:
    await redeclared(post, enabled=False)
    await post.set_back(NOON)
    await redeclared(post, enabled=True)
    assert await post.slots() == []


@pytest.mark.parametrize("change", [{}, {"overlap": "queue"}, {"payload": {"times": 2}}])
async def test_a_declaration_that_keeps_its_slots_makes_up_for_those_that_were_missed(
    post: Post, change: dict[str, Any]
) -> None:
    await post.begin(NOON)
    await redeclared(post, **change)
    assert (await post.outcomes())[-1] == "fired"


async def test_of_two_declarations_that_of_the_worker_which_started_last_holds_while_it_lives(
    sessions: Sessions, stage: Stage
) -> None:
    old = Post(sessions, stage, Schedule(name="bell", cron="0 3 * * *"))
    new = Post(sessions, stage, Schedule(name="bell", cron="0 4 * * *"))

    async def declared() -> Any:
        return await stage.value("SELECT cron FROM bulwark.schedule")

    of_the_old, of_the_new = await old.watchman(), await new.watchman()
    await of_the_old.look_round()
    await of_the_new.look_round()
    await of_the_old.look_round()
    assert await declared() == "0 4 * * *"
    await stage.value("UPDATE bulwark.schedule SET watermark = now() - interval '1 day'")
    assert await old.fire() == []

    await stage.value(
        "UPDATE bulwark.worker SET ended_at = now() WHERE id = "
        "(SELECT declared_by FROM bulwark.schedule)"
    )
    await of_the_new.look_round()
    assert await declared() == "0 4 * * *"
    await of_the_old.look_round()
    assert await declared() == "0 3 * * *"


# The task of a worker


async def test_a_worker_wakes_for_each_slot(sessions: Sessions, stage: Stage) -> None:
    seconds = Schedule(name="bell", cron="* * * * * *", overlap="queue")
    post = Post(sessions, stage, seconds)
    task = asyncio.create_task((await post.watchman()).run_forever())

    async def three() -> bool:
        return await post.jobs_made() >= 3

    await until(three, "three slots are fired")
    await cancel_until_done(task)
    assert await stage.value("SELECT min(lag) >= '0 s' FROM bulwark.slot")


async def test_a_worker_sleeps_until_the_next_slot_but_not_long(
    sessions: Sessions, stage: Stage
) -> None:
    post = Post(sessions, stage, Schedule(name="bell", cron="0 0 1 1 *"))
    assert await (await post.watchman()).look_round() <= 30.0
    soon = Post(sessions, stage, Schedule(name="bell", cron="*/5 * * * * *"))
    assert 0.2 < await (await soon.watchman()).look_round() <= 5.0


async def test_a_schedule_that_cannot_be_fired_keeps_no_other_from_it(
    sessions: Sessions, stage: Stage
) -> None:
    post = Post(
        sessions,
        stage,
        Schedule(name="bell", cron="0 0 1 1 *"),
        Schedule(name="broken", cron="0 0 1 1 *"),
    )
    await post.begin(NOON)
    await stage.value(
        "ALTER TABLE bulwark.slot ADD CONSTRAINT no_more CHECK (schedule <> 'broken')"
    )
    watchman = await post.watchman()
    with capture_logs() as logs:
        for _ in range(3):
            await watchman.look_round()
        await stage.value("ALTER TABLE bulwark.slot DROP CONSTRAINT no_more")
        await watchman.look_round()
    assert (await post.outcomes("bell"))[-1] == "fired"
    assert (await post.outcomes("broken"))[-1] == "fired"
    told = [line for line in logs if line["event"] in ("schedule.failed", "schedule.back")]
    assert [(line["event"], line["schedule"]) for line in told] == [
        ("schedule.failed", "broken"),
        ("schedule.back", "broken"),
    ]


async def test_old_slots_go_while_the_last_one_and_the_watermark_stay(
    sessions: Sessions, stage: Stage
) -> None:
    post = Post(sessions, stage, Schedule(**EVERY_MINUTE, **ALL))
    await post.begin(NOON)
    await post.fire(NOON + 3 * MINUTE)
    await post.begin(recent := await now_of(stage) - timedelta(days=89))
    await post.fire(recent + 2 * MINUTE)
    kept = (await post.slots())[3:]

    await Rescue(uuid4(), sessions, 15.0).tidy()

    assert await post.slots() == kept
    assert len(kept) == 2
    assert await post.fire(recent + 2 * MINUTE) == []


async def test_the_last_slot_stays_however_old_it_is(post: Post) -> None:
    await post.begin(NOON)
    await post.fire(NOON + MINUTE)
    await Rescue(uuid4(), post.sessions, 15.0).tidy()
    assert await post.outcomes() == ["fired"]


# The command line


@pytest.fixture
def cli(database_url: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Knows a job with three schedules."""
    monkeypatch.chdir(tmp_path)
    return make_cli(database_url, redis_url, job_modules="tests.sample_jobs.keep_watch")


def listed(cli: Cli, **settings: str) -> dict[str, dict[str, Any]]:
    lines = cli("schedule", "--json", **settings).stdout.splitlines()
    return {one["name"]: one for one in map(json.loads, lines)}


def test_the_schedules_are_listed_with_their_next_slot_and_why_they_are_off(cli: Cli) -> None:
    found = listed(cli)

    assert {"night_watch", "vigil", "watch"} < set(found)
    assert " ".join(found["watch"]) == (
        "name kind cron timezone on off_because next_at last_at outcome fired_at lag_s fired_by "
        "job_id state reason"
    )
    night = found["night_watch"]
    assert (night["cron"], night["timezone"]) == ("0 3 * * *", "Europe/Berlin")
    assert (night["on"], night["off_because"]) == (False, "it is not enabled")
    assert night["next_at"] is None
    vigil = datetime.fromisoformat(found["vigil"]["next_at"])
    assert (vigil.hour, vigil.minute) == (4, 0)
    assert vigil > datetime.now(UTC)


@pytest.mark.parametrize(
    ("name", "kind", "setting", "value"),
    [
        ("nightly_purge", "purge_deleted_rows", "BULWARK_RETENTION_DAYS", "hero=30"),
        ("ledger_maintenance", "maintain_ledger", "BULWARK_LEDGER_RETENTION_DAYS", "job=90"),
    ],
)
def test_purge_and_maintenance_are_declared_and_off_until_their_retention_is_set(
    cli: Cli, name: str, kind: str, setting: str, value: str
) -> None:
    off, on = listed(cli)[name], listed(cli, **{setting: value})[name]
    assert (off["kind"], off["on"]) == (kind, False)
    assert off["off_because"] == f"{setting} is not set"
    assert (on["on"], on["off_because"]) == (True, None)


def test_a_schedule_that_waits_for_a_setting_names_it_and_cannot_be_fired(cli: Cli) -> None:
    shown = cli("schedule", BULWARK_REDIS_URL="").stdout
    assert "off: BULWARK_REDIS_URL is not set" in shown
    result = cli("schedule", "run", "vigil", BULWARK_REDIS_URL="")
    assert result.exit_code == 2
    assert "The schedule vigil is off until BULWARK_REDIS_URL is set." in sentence(result)


def test_a_schedule_fired_by_hand_is_a_slot_of_its_own_that_says_who_did_it(cli: Cli) -> None:
    accepted = json.loads(cli("schedule", "run", "night_watch", "--actor", "Zoë", "--json").stdout)
    night = listed(cli)["night_watch"]

    assert (night["job_id"], night["state"]) == (accepted["job_id"], "queued")
    assert (night["outcome"], night["fired_by"], night["lag_s"]) == ("manual", "Zoë", 0.0)
    job = json.loads(cli("job", accepted["job_id"], "--json").stdout)
    assert (job["kind"], job["actor"]) == ("keep_watch", "Zoë")
    assert job["correlation_id"].startswith("night_watch/")


def test_a_schedule_whose_job_has_not_ended_is_not_fired_by_hand(cli: Cli) -> None:
    first = json.loads(cli("schedule", "run", "night_watch", "--json").stdout)
    again = cli("schedule", "run", "night_watch")
    assert again.exit_code == 2
    assert f"job {first['job_id']}, which schedule night_watch fired last" in sentence(again)
    assert cli("schedule", "run", "watch").exit_code == 0
    assert cli("schedule", "run", "watch").exit_code == 0


def test_a_schedule_that_is_not_there_names_a_near_one(cli: Cli) -> None:
    result = cli("schedule", "run", "nite_watch")
    assert result.exit_code == 2
    assert "no schedule 'nite_watch'; did you mean 'night_watch'?" in sentence(result)


def test_an_override_of_a_schedule_that_is_not_there_ends_worker_and_command(cli: Cli) -> None:
    for words in (("schedule",), ("worker",)):
        result = cli(*words, BULWARK_SCHEDULES='{"nite_watch": {"enabled": true}}')
        assert result.exit_code == 4
        assert "BULWARK_SCHEDULES: there is no schedule 'nite_watch'" in sentence(result)


async def test_a_schedule_that_no_job_declares_any_more_is_listed_as_off(
    cli: Cli, post: Post
) -> None:
    await post.begin(NOON)
    await post.fire(NOON + MINUTE)
    bell = (await asyncio.to_thread(listed, cli))["bell"]
    assert (bell["on"], bell["off_because"]) == (False, "no job declares it here")
    assert (bell["outcome"], bell["state"], bell["lag_s"]) == ("fired", "queued", 0.0)
