"""soft_delete_rows and restore_rows: what goes, what goes along, and what comes back."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa

from db.registry import discover_models
from jobs.insert_rows import InsertRows
from jobs.restore_rows import RestoreRows
from jobs.soft_delete_rows import SoftDeleteRows
from jobs.update_rows import UpdateRows
from tests import unusual_models
from tests.inprocess import Bench

Request = SoftDeleteRows | RestoreRows | UpdateRows | InsertRows


@pytest.fixture
async def club(bench: Bench) -> Bench:
    """A worker, two teams, three heroes of the first, and roles: ids begin at 1."""
    await bench.run(InsertRows(table="team", rows=[{"name": "A"}, {"name": "B"}]))
    heroes: list[Any] = [
        {"external_id": f"h{n}", "name": f"Hero {n}", "email": f"h{n}@x.org", "team_id": 1}
        for n in (1, 2, 3)
    ]
    await bench.run(InsertRows(table="hero", rows=heroes))
    roles: list[Any] = [
        {"hero_id": hero, "team_id": team, "role": role}
        for hero, team, role in ((1, 1, "captain"), (1, 2, "guest"), (2, 1, "coach"))
    ]
    await bench.run(InsertRows(table="membership", rows=roles))
    return bench


async def run(bench: Bench, request: Request) -> tuple[Mapping[str, int], UUID]:
    job_id = await bench.run(request)
    done = await bench.job(job_id)
    assert done.state == "succeeded", done.error
    return await bench.counts(job_id), job_id


async def live(bench: Bench, table: str) -> list[int]:
    async with bench.sessions() as session:
        query = sa.text(f"SELECT id FROM {table} WHERE deleted_at IS NULL ORDER BY id")
        return list(await session.scalars(query))


async def reason(bench: Bench, job_id: UUID) -> tuple[str, str]:
    [one] = await bench.verdicts(job_id)
    return one.code, one.message


async def test_a_deleted_hero_takes_the_roles_along(club: Bench) -> None:
    counts, job_id = await run(club, SoftDeleteRows(table="hero", keys=[1, 3, 9]))
    assert counts == {"deleted": 2, "missing": 1}
    assert await live(club, "hero") == [2]
    assert await live(club, "membership") == [3]
    assert (await club.job(job_id)).outcome["along"] == {"membership": 2}


async def test_deleting_twice_changes_nothing_the_second_time(club: Bench) -> None:
    await run(club, SoftDeleteRows(table="hero", keys=[1]))
    counts, job_id = await run(club, SoftDeleteRows(table="hero", keys=[1]))
    assert counts == {"unchanged": 1}
    assert await club.audit(job_id) == []


async def test_what_was_deleted_along_comes_back_along(club: Bench) -> None:
    await run(club, SoftDeleteRows(table="membership", keys=[2]))
    await run(club, SoftDeleteRows(table="hero", keys=[1]))
    counts, job_id = await run(club, RestoreRows(table="hero", keys=[1, 2]))
    assert counts == {"restored": 1, "unchanged": 1}
    assert await live(club, "hero") == [1, 2, 3]
    assert await live(club, "membership") == [1, 3]
    assert (await club.job(job_id)).outcome["along"] == {"membership": 1}


async def test_the_audit_leads_back(club: Bench) -> None:
    _, deleting = await run(club, SoftDeleteRows(table="hero", keys=[2]))
    _, restoring = await run(club, RestoreRows(table="hero", keys=[2]))
    deleted, along = await club.audit(deleting)
    assert (deleted["action"], deleted["table_name"], deleted["keys"]) == (
        *("delete", "hero"),
        {"keys": [[2]]},
    )
    assert deleted["before"] == along["before"] == {"deleted_at": None}
    assert (along["table_name"], along["keys"]) == ("membership", {"keys": [[3]]})
    assert (deleted["version"], along["version"]) == (1, 1)
    restored, back = await club.audit(restoring)
    assert restored["before"]["deleted_at"] == back["before"]["deleted_at"]
    assert restored["before"]["deleted_at"] is not None
    assert (restored["action"], restored["version"], back["version"]) == ("restore", 2, 2)


async def test_a_team_with_heroes_is_not_deleted(club: Bench) -> None:
    counts, job_id = await run(club, SoftDeleteRows(table="team", keys=[1, 2]))
    assert counts == {"rejected": 1, "deleted": 1}
    code, message = await reason(club, job_id)
    assert code == "still_referenced"
    assert message == "hero.team_id still refers to it, as id 1 does"
    assert await live(club, "team") == [1]
    assert await live(club, "membership") == [1, 3]


async def test_a_relationship_may_be_treated_otherwise_than_declared(club: Bench) -> None:
    wish = {"hero.team_id": "cascade"}
    request = SoftDeleteRows(table="team", keys=[1], references=wish)  # type: ignore[arg-type]  # as JSON gives it
    counts, job_id = await run(club, request)
    assert counts == {"deleted": 1}
    assert await live(club, "hero") == await live(club, "membership") == []
    assert (await club.job(job_id)).outcome["along"] == {"hero": 3, "membership": 3}
    back = RestoreRows(table="team", keys=[1], references=wish)  # type: ignore[arg-type]  # as above
    await run(club, back)
    assert (await live(club, "hero"), await live(club, "membership")) == ([1, 2, 3], [1, 2, 3])


async def test_what_is_left_stays_as_it_is(club: Bench) -> None:
    request = SoftDeleteRows(
        table="team", keys=[1], references={"hero.team_id": "leave", "membership.team_id": "leave"}
    )
    await run(club, request)
    assert (await live(club, "hero"), await live(club, "membership")) == ([1, 2, 3], [1, 2, 3])


async def test_a_role_is_not_restored_without_its_hero(club: Bench) -> None:
    await run(club, SoftDeleteRows(table="hero", keys=[1]))
    counts, job_id = await run(club, RestoreRows(table="membership", keys=[1]))
    assert counts == {"rejected": 1}
    code, message = await reason(club, job_id)
    assert code == "parent_deleted"
    assert message == "membership.hero_id refers to a hero that is deleted; restore that first"


async def test_a_role_in_a_deleted_team_does_not_come_back_with_its_hero(club: Bench) -> None:
    await run(club, SoftDeleteRows(table="hero", keys=[1]))
    await run(club, SoftDeleteRows(table="team", keys=[2]))
    counts, _ = await run(club, RestoreRows(table="hero", keys=[1]))
    assert counts == {"restored": 1}
    assert await live(club, "membership") == [1, 3]


async def test_a_value_taken_meanwhile_keeps_a_row_deleted(club: Bench) -> None:
    await run(club, SoftDeleteRows(table="hero", keys=[1]))
    again: list[Any] = [{"name": "Heir", "email": "h1@x.org"}]
    await run(club, InsertRows(table="hero", rows=again))
    counts, job_id = await run(club, RestoreRows(table="hero", keys=[1]))
    assert counts == {"rejected": 1}
    code, message = await reason(club, job_id)
    assert code == "unique_violation"
    assert "id 1 has the email that id 4 has by now" in message
    assert await live(club, "membership") == [3]


async def test_a_role_taken_meanwhile_keeps_its_hero_deleted(club: Bench) -> None:
    await run(club, SoftDeleteRows(table="hero", keys=[2]))
    async with club.sessions.begin() as session:
        await session.execute(
            sa.text("INSERT INTO membership (hero_id, team_id, role) VALUES (2, 1, 'coach')")
        )
    counts, job_id = await run(club, RestoreRows(table="hero", keys=[2]))
    assert counts == {"rejected": 1}
    assert "membership id 3, which was deleted along with it" in (await reason(club, job_id))[1]
    assert await live(club, "hero") == [1, 3]


async def test_of_two_with_one_value_the_first_comes_back(club: Bench) -> None:
    await run(club, SoftDeleteRows(table="hero", keys=[1]))
    await run(club, UpdateRows(table="hero", keys=[2], values={"email": "h1@x.org"}))
    await run(club, SoftDeleteRows(table="hero", keys=[2]))
    counts, job_id = await run(club, RestoreRows(table="hero", keys=[2, 1]))
    assert counts == {"restored": 1, "rejected": 1}
    assert [one.row_no for one in await club.verdicts(job_id)] == [2]
    assert await live(club, "hero") == [2, 3]


async def test_by_natural_key_the_row_deleted_last_comes_back(club: Bench) -> None:
    await run(club, SoftDeleteRows(table="hero", keys=["h3"], key=["external_id"]))
    await run(club, InsertRows(table="hero", rows=[{"external_id": "h3", "name": "New"}]))
    await run(club, SoftDeleteRows(table="hero", keys=["h3"], key=["external_id"]))
    counts, _ = await run(club, RestoreRows(table="hero", rows=[{"external_id": "h3"}]))
    assert counts == {"restored": 1}
    async with club.sessions() as session:
        names = await session.scalars(sa.text("SELECT name FROM hero WHERE deleted_at IS NULL"))
        assert sorted(names) == ["Hero 1", "Hero 2", "New"]


@pytest.mark.parametrize("chunk_rows", [1, 100])
async def test_what_goes_along_later_still_refuses_an_earlier_row(
    club: Bench, chunk_rows: int
) -> None:
    wanted: Any = {"hero.team_id": "cascade", "membership.team_id": "refuse"}
    request = SoftDeleteRows(table="team", keys=[2, 1], references=wanted, chunk_rows=chunk_rows)
    counts, job_id = await run(club, request)
    assert counts == {"rejected": 1, "deleted": 1}
    assert [one.row_no for one in await club.verdicts(job_id)] == [1]
    assert await live(club, "team") == [2]


async def test_a_role_stays_deleted_when_its_hero_cannot_come_back(club: Bench) -> None:
    along: Any = {"hero.team_id": "cascade"}
    await run(club, SoftDeleteRows(table="team", keys=[1, 2], references=along))
    await run(club, InsertRows(table="team", rows=[{"name": "A"}]))
    counts, _ = await run(club, RestoreRows(table="team", keys=[1, 2], references=along))
    assert counts == {"rejected": 1, "restored": 1}
    assert await live(club, "team") == [2, 3]
    assert await live(club, "hero") == []
    assert await live(club, "membership") == []


@pytest.fixture
async def fleet(bench: Bench, unusual_tables: None) -> Bench:
    """A worker, and two ships that their own sailors command: ids begin at 1."""
    bench.models = discover_models([unusual_models.__name__])
    await bench.run(InsertRows(table="ship", rows=[{"name": "A"}, {"name": "B"}]))
    sailors: list[Any] = [{"name": f"Sailor {n}", "ship_id": 1 + n % 2} for n in range(4)]
    await bench.run(InsertRows(table="sailor", rows=sailors))
    captains: list[Any] = [{"id": 1, "captain_id": 1}, {"id": 2, "captain_id": 2}]
    await bench.run(UpdateRows(table="ship", rows=captains))
    return bench


async def test_rows_that_refer_to_each_other_go_and_come_back_together(fleet: Bench) -> None:
    counts, _ = await run(fleet, SoftDeleteRows(table="sailor", keys=[1]))
    assert counts == {"rejected": 1}
    counts, _ = await run(fleet, SoftDeleteRows(table="ship", keys=[1]))
    assert counts == {"deleted": 1}
    assert await live(fleet, "sailor") == [2, 4]
    counts, _ = await run(fleet, RestoreRows(table="ship", keys=[1]))
    assert counts == {"restored": 1}
    assert await live(fleet, "ship") == [1, 2]
    assert await live(fleet, "sailor") == [1, 2, 3, 4]


async def test_a_row_that_refers_to_itself_goes_and_comes_back(fleet: Bench) -> None:
    await run(fleet, UpdateRows(table="ship", keys=[2], values={"towed_by": 2}))
    counts, _ = await run(fleet, SoftDeleteRows(table="ship", keys=[2]))
    assert counts == {"deleted": 1}
    counts, _ = await run(fleet, RestoreRows(table="ship", keys=[2]))
    assert counts == {"restored": 1}


async def test_rows_that_go_one_by_one_take_no_more_locks_the_more_they_are(fleet: Bench) -> None:
    made: list[str] = []

    @sa.event.listens_for(fleet.sessions.kw["bind"].sync_engine, "before_cursor_execute")
    def note(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("CREATE TEMPORARY TABLE bulwark_along"):
            made.append(statement)

    await run(fleet, SoftDeleteRows(table="ship", keys=[1, 2]))
    assert len(made) == 1


async def test_a_filter_deletes_live_rows_and_restores_deleted_ones(club: Bench) -> None:
    everyone: dict[str, Any] = {"name": {"like": "Hero %"}}
    counts, _ = await run(club, SoftDeleteRows(table="hero", filter=everyone, chunk_rows=2))
    assert counts == {"deleted": 3}
    counts, _ = await run(club, SoftDeleteRows(table="hero", filter=everyone))
    assert counts == {}
    counts, _ = await run(club, RestoreRows(table="hero", filter=everyone, dry_run=True))
    assert counts == {"restored": 3}
    assert await live(club, "hero") == []
    counts, _ = await run(club, RestoreRows(table="hero", filter=everyone, chunk_rows=2))
    assert counts == {"restored": 3}
    assert await live(club, "membership") == [1, 2, 3]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (
            {"keys": [1], "references": {"hero.team": "leave"}},
            "no relationship is named 'hero.team'",
        ),
        ({"rows": [{"id": 1, "name": "A"}]}, "column 'name' has no field"),
        ({"filter": {"name": "A"}, "max_rows": 0}, "the input has 1 rows and at most 0"),
    ],
)
async def test_what_cannot_be_deleted_so_is_said_in_one_sentence(
    club: Bench, request_: dict[str, Any], said: str
) -> None:
    job_id = await club.run(SoftDeleteRows(table="team", **request_))
    done = await club.job(job_id)
    assert (done.state, done.reason) == ("failed", "rejected")
    assert said in done.error
    assert await live(club, "team") == [1, 2]
