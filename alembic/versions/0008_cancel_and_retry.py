"""Cancelling a job, running a failed one again, and how many jobs may wait in a queue."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

CHECK_TRANSITION = """
CREATE OR REPLACE FUNCTION bulwark.check_job_transition() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT (
        OLD.state = 'queued' AND NEW.state IN ('running', 'cancelled')
        OR OLD.state = 'running' AND NEW.state IN ('queued', 'succeeded', 'failed', 'cancelled')
        {again}
    ) THEN
        RAISE EXCEPTION 'job % cannot go from % to %', OLD.id, OLD.state, NEW.state
            USING ERRCODE = 'check_violation', CONSTRAINT = 'job_transition';
    END IF;
    RETURN NEW;
END
$$
"""
AGAIN = "OR OLD.state IN ('failed', 'cancelled') AND NEW.state = 'queued'"


def check_transition(again: str) -> None:
    op.execute(CHECK_TRANSITION.format(again=again))


def instant(name: str) -> sa.Column:
    return sa.Column(
        name, sa.TIMESTAMP(timezone=True), server_default=sa.func.now(), nullable=False
    )


def upgrade() -> None:
    op.create_table(
        "cancellation",
        sa.Column("job_id", sa.Uuid, nullable=False),
        sa.Column("at_once", sa.Boolean, nullable=False),
        sa.Column("actor", sa.Text),
        instant("at"),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_cancellation")),
        schema="bulwark",
    )
    op.create_table(
        "depth_limit",
        sa.Column("queue", sa.Text, nullable=False),
        sa.Column("most", sa.Integer, nullable=False),
        sa.Column("actor", sa.Text),
        instant("at"),
        sa.CheckConstraint("most >= 0", name=op.f("ck_depth_limit_most")),
        sa.PrimaryKeyConstraint("queue", name=op.f("pk_depth_limit")),
        schema="bulwark",
    )
    check_transition(AGAIN)


def downgrade() -> None:
    check_transition("")
    op.drop_table("depth_limit", schema="bulwark")
    op.drop_table("cancellation", schema="bulwark")
