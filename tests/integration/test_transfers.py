"""Heroes change teams: all of an order or nothing, with roles ended, records kept, and an audit."""

from typing import Any

import asyncpg
import pytest
from pydantic import ValidationError

from db.ledger.verdict import RowVerdict
from jobs._declaration import Payload
from jobs.swap_heroes import SwapHeroes
from jobs.transfer_heroes import TransferHeroes
from tests.inprocess import Bench
from tests.league import (
    ANN,
    BLUE,
    BOB,
    CID,
    DEE,
    EVE,
    FAY,
    FULL,
    GONE,
    LOST,
    NO_TEAM,
    NOBODY,
    RED,
    changes,
    found_league,
    homes,
    roles,
    tables,
    transfers,
)


@pytest.fixture(autouse=True)
async def league(connection: asyncpg.Connection) -> None:
    await found_league(connection)


def move(*hero_ids: int, **asked: Any) -> TransferHeroes:
    """From Red to Blue unless it is asked otherwise."""
    return TransferHeroes(
        **{"hero_ids": list(hero_ids), "from_team_id": RED, "to_team_id": BLUE, **asked}
    )


def swap(hero_ids_a: list[int], hero_ids_b: list[int], **asked: Any) -> SwapHeroes:
    """Between Red and the full team."""
    return SwapHeroes(
        team_a_id=RED, hero_ids_a=hero_ids_a, team_b_id=FULL, hero_ids_b=hero_ids_b, **asked
    )


async def outcome(bench: Bench, payload: Payload) -> Any:
    """What the job reports, which has to succeed."""
    row = await bench.job(await bench.run(payload))
    assert (row.state, row.error) == ("succeeded", None)
    return row.outcome


# What takes effect


async def test_heroes_move_together_and_each_move_is_recorded_in_order(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    reported = await outcome(bench, move(CID, ANN, reason="winter"))

    assert reported == {"verdicts": {"moved": 2}, "transfers": [1, 2], "roles_ended": 2}
    assert (await homes(connection))[ANN] == (await homes(connection))[CID] == BLUE
    assert (await homes(connection))[BOB] == RED
    assert await transfers(connection) == [(CID, RED, BLUE), (ANN, RED, BLUE)]
    reasons = await connection.fetch("SELECT DISTINCT reason, version FROM transfer")
    assert [tuple(row) for row in reasons] == [("winter", 1)]


async def test_a_hero_loses_his_roles_in_the_team_that_he_leaves_and_no_others(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    before = await roles(connection)
    await outcome(bench, move(ANN, to_team_id=None))

    assert before - await roles(connection) == {(ANN, RED, "captain"), (ANN, RED, "coach")}
    ended = await connection.fetch("SELECT * FROM membership WHERE version = 2")
    assert {row["role"] for row in ended} == {"captain", "coach"}
    assert all(row["updated_at"] == row["deleted_at"] > row["created_at"] for row in ended)


async def test_version_and_time_of_a_hero_who_moves_go_on_and_those_of_others_stay(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await outcome(bench, move(ANN))
    await outcome(bench, move(ANN, from_team_id=BLUE, to_team_id=RED))

    query = "SELECT id, version FROM hero WHERE updated_at > created_at"
    assert dict(await connection.fetch(query)) == {ANN: 3}
    assert set(await connection.fetch("SELECT version FROM hero WHERE id <> $1", ANN)) == {(1,)}


async def test_the_audit_has_every_changed_row_as_it_was(bench: Bench) -> None:
    await outcome(bench, move(ANN))
    job_id = await bench.run(move(BOB, ANN, from_team_id=None, from_anywhere=True, to_team_id=None))

    assert changes(await bench.audit(job_id)) == [
        ("insert", "transfer", [[2], [3]], None, None),
        ("move", "hero", [[BOB]], {"team_id": RED}, 1),
        ("move", "hero", [[ANN]], {"team_id": BLUE}, 2),
        ("end", "membership", [[3]], {"deleted_at": None}, 1),
    ]


async def test_the_audit_names_the_job_that_moved_them(bench: Bench) -> None:
    accepted = await bench.producer.enqueue(move(ANN), actor="Zoë", correlation_id="c-1")
    await bench.deliver(accepted.job_id)

    lines = await bench.audit(accepted.job_id)
    said = {(one["kind"], one["actor"], one["correlation_id"], one["chunk_no"]) for one in lines}
    assert said == {("transfer_heroes", "Zoë", "c-1", 0)}
    assert [one["entry_no"] for one in lines] == [0, 1, 2, 3]
    assert [one["rows"] for one in lines] == [1, 1, 1, 1]


async def test_free_agents_join_and_players_are_released(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await outcome(bench, move(FAY, from_team_id=None))
    await outcome(bench, move(DEE, from_team_id=BLUE, to_team_id=None))

    assert (await homes(connection))[FAY] == BLUE
    assert (await homes(connection))[DEE] is None
    assert await transfers(connection) == [(FAY, None, BLUE), (DEE, BLUE, None)]


async def test_heroes_may_come_from_anywhere(bench: Bench, connection: asyncpg.Connection) -> None:
    await connection.execute("UPDATE hero SET team_id = $1 WHERE id = $2", GONE, CID)
    await outcome(bench, move(ANN, CID, EVE, FAY, from_team_id=None, from_anywhere=True))

    went = [(ANN, RED, BLUE), (CID, GONE, BLUE), (EVE, FULL, BLUE), (FAY, None, BLUE)]
    assert await transfers(connection) == went


async def test_full_teams_swap(bench: Bench, connection: asyncpg.Connection) -> None:
    await connection.execute("UPDATE team SET roster_limit = 3 WHERE id = $1", RED)
    reported = await outcome(bench, swap([ANN], [EVE]))

    assert reported == {"verdicts": {"moved": 2}, "transfers": [1, 2], "roles_ended": 3}
    assert await transfers(connection) == [(ANN, RED, FULL), (EVE, FULL, RED)]


async def test_a_team_that_has_too_many_already_may_swap_but_not_grow(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await connection.execute("UPDATE team SET roster_limit = 0 WHERE id = ANY('{1, 3}')")
    before = await tables(connection)
    job_id = await bench.run(swap([ANN, BOB], [EVE]))
    assert (await bench.verdicts(job_id))[0].row_no == 2
    assert await tables(connection) == before

    await outcome(bench, swap([ANN], [EVE]))
    assert await transfers(connection) == [(ANN, RED, FULL), (EVE, FULL, RED)]


async def test_a_roster_may_be_filled_to_its_limit(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await outcome(bench, move(FAY, from_team_id=None, to_team_id=RED))
    job_id = await bench.run(move(DEE, from_team_id=BLUE, to_team_id=RED))

    assert [one.code for one in await bench.verdicts(job_id)] == ["roster_full"]


async def test_an_expected_version_that_holds_lets_a_hero_pass(
    bench: Bench, connection: asyncpg.Connection
) -> None:
    await outcome(bench, move(ANN, BOB, expect_versions={ANN: 1}))
    await outcome(bench, move(ANN, from_team_id=BLUE, to_team_id=RED, expect_versions={ANN: 2}))
    assert (await homes(connection))[ANN] == RED


# What is refused

REFUSALS = {
    "unknown_hero": (move(ANN, NOBODY), 2, "there is no hero 99"),
    "deleted_hero": (move(LOST), 1, "hero 7 (Lost) is deleted; restore the hero first"),
    "hero_listed_twice": (move(ANN, BOB, ANN), 3, "hero 1 is listed twice; name each hero once"),
    "unknown_team": (move(ANN, to_team_id=NO_TEAM), 1, "there is no team 99"),
    "unknown_team to leave": (move(ANN, from_team_id=NO_TEAM), 1, "there is no team 99"),
    "deleted_team": (move(ANN, to_team_id=GONE), 1, "team 4 (Gone) is deleted; restore it"),
    "deleted_team to leave": (
        move(ANN, from_team_id=GONE),
        1,
        "team 4 (Gone) is deleted; let its heroes come from anywhere",
    ),
    "same_team": (
        move(ANN, to_team_id=RED),
        1,
        "hero 1 (Ann) would leave and join team 1 (Red); name two different teams",
    ),
    "same_team from anywhere": (
        move(DEE, from_team_id=None, from_anywhere=True),
        1,
        "hero 4 (Dee) would leave and join team 2 (Blue); name two different teams",
    ),
    "same_team of none": (
        move(FAY, from_team_id=None, from_anywhere=True, to_team_id=None),
        1,
        "hero 6 (Fay) would leave and join no team; name two different teams",
    ),
    "not_in_from_team": (
        move(ANN, DEE, from_team_id=RED, to_team_id=FULL),
        2,
        "hero 4 (Dee) is in team 2, and not in team 1 (Red)",
    ),
    "not_in_from_team as a free agent": (
        move(FAY),
        1,
        "hero 6 (Fay) is in no team, and not in team 1 (Red)",
    ),
    "not_in_from_team but in one": (
        move(ANN, from_team_id=None),
        1,
        "hero 1 (Ann) is in team 1, and no free agent",
    ),
    "roster_full": (
        move(FAY, DEE, from_team_id=None, from_anywhere=True, to_team_id=RED),
        2,
        "team 1 (Red) has 3 of at most 4 heroes, and no room for hero 4 (Dee)",
    ),
    "roster_full after a swap": (
        swap([ANN, CID, BOB], [EVE]),
        2,
        "team 3 (Full) has 1 of at most 1 heroes, and no room for hero 3 (Cid)",
    ),
    "version_conflict": (
        move(ANN, BOB, expect_versions={BOB: 4, ANN: 1}),
        2,
        "hero 2 (Bob) is at version 1, not at the expected 4",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
async def test_what_is_refused_says_why_and_changes_nothing(
    name: str, bench: Bench, connection: asyncpg.Connection
) -> None:
    payload, row_no, message = REFUSALS[name]
    code = name.split(maxsplit=1)[0]
    before = await tables(connection)
    job_id = await bench.run(payload)

    row: Any = await bench.job(job_id)
    assert (row.state, row.reason, row.error) == ("failed", "rejected", f"{code}: {message}")
    assert await tables(connection) == before
    assert await bench.audit(job_id) == []
    (verdict,) = await bench.verdicts(job_id)
    kind = "conflict" if code == "version_conflict" else "rejected"
    told = RowVerdict(row_no, 0, None, kind, code, verdict.column, message, None)
    assert verdict == told
    given = len(payload.hero_ids) if isinstance(payload, TransferHeroes) else 4
    assert row.outcome["verdicts"].pop(kind) == 1
    assert sum(row.outcome["verdicts"].values()) == given - 1


async def test_a_version_is_judged_before_the_team_that_it_may_have_changed(bench: Bench) -> None:
    await outcome(bench, move(ANN))
    job_id = await bench.run(move(ANN, expect_versions={ANN: 1}))
    assert [one.verdict for one in await bench.verdicts(job_id)] == ["conflict"]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"from_team_id": None, "to_team_id": None}, "neither a team to leave nor a team to join"),
        ({"from_anywhere": True}, "from_anywhere does not go with from_team_id"),
        ({"hero_ids": []}, "at least 1 item"),
        ({"hero_ids": [*range(1, 1002)]}, "at most 1000 items"),
        ({"hero_ids": [0]}, "greater than or equal to 1"),
        ({"hero_ids": [2**63]}, "less than or equal to"),
        ({"expect_versions": {BOB: 1}}, "a version is expected of hero 2, who is not to be moved"),
        ({"reason": "a NUL \0"}, "should match pattern"),
        ({"to_team": 1}, "Extra inputs"),
    ],
)
def test_a_payload_that_makes_no_sense_is_refused_before_it_is_accepted(
    asked: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValidationError, match=sentence):
        move(ANN, **asked)


def test_a_hero_without_a_place_to_go_is_not_released_by_omission() -> None:
    with pytest.raises(ValidationError, match="to_team_id\n  Field required"):
        TransferHeroes.model_validate({"hero_ids": [ANN], "from_team_id": RED})


# Dry runs


@pytest.mark.parametrize("name", ["", *REFUSALS])
async def test_a_dry_run_tells_what_would_be_and_changes_nothing(
    name: str, bench: Bench, connection: asyncpg.Connection
) -> None:
    payload, _, message = REFUSALS.get(name, (move(ANN, BOB), 0, ""))
    before = await tables(connection)
    real = await bench.run(payload) if name else None
    reported = await outcome(bench, payload.model_copy(update={"dry_run": True}))

    assert reported.pop("dry_run") is True
    assert await tables(connection) == before
    if real is None:
        assert reported == {"verdicts": {"moved": 2}}
    else:
        refused = {"refused": f"{name.split(maxsplit=1)[0]}: {message}"}
        assert reported == (await bench.job(real)).outcome | refused
