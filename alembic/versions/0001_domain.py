"""Teams, heroes, memberships and transfers."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

LIVE = sa.text("deleted_at IS NULL")
DELETED = sa.text("deleted_at IS NOT NULL")


def instant(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    default = None if nullable else sa.text("now()")
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable, server_default=default)


def key() -> sa.Column[Any]:
    return sa.Column("id", sa.BigInteger, sa.Identity(always=False), nullable=False)


def kept_columns() -> list[sa.Column[Any]]:
    return [
        instant("created_at"),
        instant("updated_at"),
        sa.Column("version", sa.Integer, nullable=False, server_default=sa.text("1")),
        instant("deleted_at", nullable=True),
    ]


def unique_among_live(table: str, *columns: str) -> None:
    name = f"uq_{table}_{'_'.join(columns)}"
    op.create_index(name, table, list(columns), unique=True, postgresql_where=LIVE)


def deleted_first(table: str) -> None:
    op.create_index(f"ix_{table}_deleted_at", table, ["deleted_at"], postgresql_where=DELETED)


def indexed(table: str, column: str) -> None:
    op.create_index(f"ix_{table}_{column}", table, [column])


def create_team() -> None:
    op.create_table(
        "team",
        key(),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("roster_limit", sa.Integer),
        *kept_columns(),
        sa.PrimaryKeyConstraint("id", name="pk_team"),
        sa.CheckConstraint("roster_limit >= 0", name=op.f("ck_team_roster_limit_not_negative")),
    )
    unique_among_live("team", "name")
    deleted_first("team")


def create_hero() -> None:
    op.create_table(
        "hero",
        key(),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("age", sa.Integer),
        sa.Column("email", sa.String(254)),
        sa.Column("external_id", sa.String(200)),
        sa.Column("team_id", sa.BigInteger),
        sa.Column("secret_name", sa.String(200)),
        *kept_columns(),
        sa.PrimaryKeyConstraint("id", name="pk_hero"),
        sa.ForeignKeyConstraint(["team_id"], ["team.id"], name="fk_hero_team_id"),
        sa.CheckConstraint("age >= 0", name=op.f("ck_hero_age_not_negative")),
    )
    indexed("hero", "team_id")
    unique_among_live("hero", "email")
    unique_among_live("hero", "external_id")
    deleted_first("hero")


def create_membership() -> None:
    op.create_table(
        "membership",
        key(),
        sa.Column("hero_id", sa.BigInteger, nullable=False),
        sa.Column("team_id", sa.BigInteger, nullable=False),
        sa.Column("role", sa.String(200), nullable=False),
        *kept_columns(),
        sa.PrimaryKeyConstraint("id", name="pk_membership"),
        sa.ForeignKeyConstraint(["hero_id"], ["hero.id"], name="fk_membership_hero_id"),
        sa.ForeignKeyConstraint(["team_id"], ["team.id"], name="fk_membership_team_id"),
    )
    indexed("membership", "hero_id")
    indexed("membership", "team_id")
    unique_among_live("membership", "hero_id", "team_id", "role")
    deleted_first("membership")


def create_transfer() -> None:
    op.create_table(
        "transfer",
        key(),
        sa.Column("hero_id", sa.BigInteger, nullable=False),
        sa.Column("from_team_id", sa.BigInteger),
        sa.Column("to_team_id", sa.BigInteger),
        instant("transferred_at"),
        sa.Column("reason", sa.String(2000)),
        *kept_columns(),
        sa.PrimaryKeyConstraint("id", name="pk_transfer"),
        sa.ForeignKeyConstraint(["hero_id"], ["hero.id"], name="fk_transfer_hero_id"),
        sa.ForeignKeyConstraint(["from_team_id"], ["team.id"], name="fk_transfer_from_team_id"),
        sa.ForeignKeyConstraint(["to_team_id"], ["team.id"], name="fk_transfer_to_team_id"),
    )
    for column in ("hero_id", "from_team_id", "to_team_id"):
        indexed("transfer", column)
    deleted_first("transfer")


def upgrade() -> None:
    create_team()
    create_hero()
    create_membership()
    create_transfer()


def downgrade() -> None:
    for table in ("transfer", "membership", "hero", "team"):
        op.drop_table(table)
