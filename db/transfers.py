"""Transfers: heroes change teams, many orders in one transaction by the same few statements."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession

from db.ledger.audit import ORIGIN_TYPES, insert_lines_sql
from db.orders import Moved, Order, Refused
from db.rosters import Step, lock_rosters


async def transfer(session: AsyncSession, orders: Sequence[Order]) -> list[Moved | Refused]:
    """Judge the orders one after the other, and carry out those against which nothing stands.

    What becomes of each, and what the tables are like in the end, is as if each order had its own
    transaction. A hero who leaves a team loses his roles there; every change is in the audit in the
    name of its order's origin. A limit of a roster is one on transfers: rows that are imported or
    restored do not ask it.
    """
    rosters = await lock_rosters(session, orders)
    results: list[Moved | Refused] = []
    steps: list[_Numbered] = []
    for number, order in enumerate(orders):
        refused = rosters.why_not(order)
        results.append(refused or Moved())
        if refused is None and not order.dry_run:
            steps += [_Numbered(number, order, step) for step in rosters.take_effect(order)]
    for number, moved in (await _write(session, steps)).items():
        results[number] = moved
    return results


class _Numbered(NamedTuple):
    """A step and the order that it belongs to."""

    order_no: int
    order: Order
    step: Step


_ORIGIN = ", ".join(ORIGIN_TYPES)
_INPUT = {
    "order_no": sa.Integer,
    **ORIGIN_TYPES,
    "reason": sa.Text,
    "hero_id": sa.BigInteger,
    "from_team_id": sa.BigInteger,
    "to_team_id": sa.BigInteger,
    "version": sa.Integer,
}
# No two of these lists are joined to each other: the planner, who does not know how long they are,
# might do that by comparing each with each.
_WRITE = sa.text(
    f"""
    WITH step AS MATERIALIZED (
        SELECT s.*, nextval((SELECT pg_get_serial_sequence('transfer', 'id')::regclass))
                    AS transfer_id
          FROM unnest({", ".join(f":{name}" for name in _INPUT)})
               WITH ORDINALITY AS s ({", ".join(_INPUT)}, step_no)
    ), last AS (
        SELECT DISTINCT ON (hero_id) hero_id, to_team_id,
               count(*) OVER (PARTITION BY hero_id) AS steps
          FROM step ORDER BY hero_id, step_no DESC
    ), moved AS (
        UPDATE hero SET team_id = last.to_team_id, version = hero.version + last.steps,
                        updated_at = now()
          FROM last WHERE hero.id = last.hero_id
    ), leaving AS (
        SELECT DISTINCT ON (hero_id, from_team_id) step_no, order_no, {_ORIGIN}, hero_id,
               from_team_id
          FROM step WHERE from_team_id IS NOT NULL ORDER BY hero_id, from_team_id, step_no
    ), role AS MATERIALIZED (
        SELECT membership.id, membership.version, step_no, order_no, {_ORIGIN}
          FROM leaving JOIN membership
            ON membership.hero_id = leaving.hero_id AND membership.team_id = leaving.from_team_id
         WHERE membership.deleted_at IS NULL
         ORDER BY membership.id FOR NO KEY UPDATE OF membership
    ), ended AS (
        UPDATE membership SET deleted_at = now(), version = role.version + 1, updated_at = now()
          FROM role WHERE membership.id = role.id RETURNING role.*
    ), written AS (
        INSERT INTO transfer (id, hero_id, from_team_id, to_team_id, reason)
        SELECT transfer_id, hero_id, from_team_id, to_team_id, reason FROM step ORDER BY step_no
    ), line AS (
        SELECT {_ORIGIN}, 0 AS place, 'insert' AS action, 'transfer' AS table_name,
               jsonb_agg(jsonb_build_array(transfer_id) ORDER BY step_no) AS keys,
               NULL::jsonb AS before, NULL::integer AS version
          FROM step GROUP BY {_ORIGIN}
         UNION ALL
        SELECT {_ORIGIN}, step_no, 'move', 'hero', jsonb_build_array(jsonb_build_array(hero_id)),
               jsonb_build_object('team_id', from_team_id), version
          FROM step
         UNION ALL
        SELECT {_ORIGIN}, step_no, 'end', 'membership', jsonb_build_array(jsonb_build_array(id)),
               jsonb_build_object('deleted_at', NULL), version
          FROM ended
    ), audited AS (
        {insert_lines_sql("line")}
    )
    SELECT order_no, min(transfer_id) AS first, max(transfer_id) AS last, sum(roles) AS roles
      FROM (SELECT order_no, transfer_id, 0 AS roles FROM step
             UNION ALL SELECT order_no, NULL, 1 FROM ended) AS done
     GROUP BY order_no
    """
).bindparams(*(sa.bindparam(name, type_=ARRAY(type_)) for name, type_ in _INPUT.items()))


async def _write(session: AsyncSession, steps: Sequence[_Numbered]) -> dict[int, Moved]:
    """Let the steps take effect in the tables; what came of each order, by its number."""
    if not steps:
        return {}
    rows = [_row(one) for one in steps]
    done = await session.execute(_WRITE, {name: [row[name] for row in rows] for name in _INPUT})
    return {one.order_no: Moved((one.first, one.last), one.roles) for one in done}


def _row(numbered: _Numbered) -> Mapping[str, Any]:
    order, step = numbered.order, numbered.step
    return {
        "order_no": numbered.order_no,
        **order.origin.row,
        "reason": order.reason,
        "hero_id": step.hero_id,
        "from_team_id": step.from_team_id,
        "to_team_id": step.to_team_id,
        "version": step.version,
    }
