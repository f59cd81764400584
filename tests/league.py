"""A small league: teams, heroes and their roles, and all that its tables hold."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

import asyncpg

from db.ledger.audit import Origin
from db.ledger.job import Claim

RED, BLUE, FULL, GONE, GREEN, GOLD, NO_TEAM = 1, 2, 3, 4, 5, 6, 99
ANN, BOB, CID, DEE, EVE, FAY, LOST, NOBODY = 1, 2, 3, 4, 5, 6, 7, 99
"""Ann, Bob and Cid are Red, Dee is Blue, Eve is in the full team, Fay is free, Lost is deleted."""

_LEAGUE = """
    TRUNCATE team, hero, membership, transfer RESTART IDENTITY;
    INSERT INTO team (name, roster_limit, deleted_at) VALUES
        ('Red', 4, NULL), ('Blue', NULL, NULL), ('Full', 1, NULL), ('Gone', NULL, '2020-02-01'),
        ('Green', 2, NULL), ('Gold', NULL, NULL);
    INSERT INTO hero (name, team_id, deleted_at) VALUES
        ('Ann', 1, NULL), ('Bob', 1, NULL), ('Cid', 1, NULL), ('Dee', 2, NULL), ('Eve', 3, NULL),
        ('Fay', NULL, NULL), ('Lost', 1, '2020-02-01');
    INSERT INTO membership (hero_id, team_id, role, deleted_at) VALUES
        (1, 1, 'captain', NULL), (1, 1, 'coach', NULL), (1, 2, 'scout', NULL),
        (1, 1, 'keeper', '2020-02-01'), (4, 2, 'captain', NULL), (5, 3, 'captain', NULL);
    UPDATE hero SET created_at = '2020-01-01', updated_at = '2020-01-01';
    UPDATE membership SET created_at = '2020-01-01', updated_at = '2020-01-01';
"""
DOMAIN = ("team", "hero", "membership", "transfer")


async def found_league(connection: asyncpg.Connection) -> None:
    """Begin anew, with ids from 1."""
    await connection.execute(_LEAGUE)


async def tables(connection: asyncpg.Connection) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of the domain, in full, as it is."""
    return {
        name: [tuple(row) for row in await connection.fetch(f"SELECT * FROM {name} ORDER BY id")]
        for name in DOMAIN
    }


async def homes(connection: asyncpg.Connection) -> dict[int, int | None]:
    """By hero, his team."""
    return dict(await connection.fetch("SELECT id, team_id FROM hero ORDER BY id"))


async def roles(connection: asyncpg.Connection) -> set[tuple[int, int, str]]:
    """The roles that heroes have now."""
    query = "SELECT hero_id, team_id, role FROM membership WHERE deleted_at IS NULL"
    return {tuple(row) for row in await connection.fetch(query)}


async def transfers(connection: asyncpg.Connection) -> list[tuple[int, int | None, int | None]]:
    """Who went from where to where, in order."""
    query = "SELECT hero_id, from_team_id, to_team_id FROM transfer ORDER BY id"
    return [tuple(row) for row in await connection.fetch(query)]


def changes(audit: list[Mapping[str, Any]]) -> list[tuple[str, str, Any, Any, Any]]:
    """The lines of an audit: action, table, keys, before-image and version."""
    return [
        (one["action"], one["table_name"], one["keys"]["keys"], one["before"], one["version"])
        for one in audit
    ]


def origin(number: int) -> Origin:
    """One of many jobs, which have no rows: nothing refers to those."""
    job_id, claim_id = UUID(int=number), UUID(int=number + 2**64)
    held = Claim(
        job_id,
        claim_id,
        UUID(int=0),
        "transfer_heroes",
        {},
        0,
        1,
        60,
        f"actor {number}",
        None,
        0,
        0,
    )
    return Origin(held)
