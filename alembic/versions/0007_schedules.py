"""Schedules, and their slots: which job was made of each, when and by whom."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "schedule",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("cron", sa.Text, nullable=False),
        sa.Column("time_zone", sa.Text, nullable=False),
        sa.Column("is_on", sa.Boolean, nullable=False),
        sa.Column("watermark", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("declared_by", sa.Uuid),
        sa.Column(
            "declared_at",
            sa.TIMESTAMP(timezone=True),
            nullable=False,
            server_default=sa.func.now(),
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_schedule")),
        schema="bulwark",
    )
    op.create_table(
        "slot",
        sa.Column("schedule", sa.Text, nullable=False),
        sa.Column("at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("fired_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("lag", postgresql.INTERVAL, sa.Computed("fired_at - at", persisted=True)),
        sa.Column("fired_by", sa.Text),
        sa.Column("job_id", sa.Uuid),
        sa.CheckConstraint(
            "outcome IN ('fired', 'manual', 'missed', 'overlapped')",
            name=op.f("ck_slot_outcome"),
        ),
        sa.CheckConstraint(
            "(outcome IN ('fired', 'manual')) = (job_id IS NOT NULL)", name=op.f("ck_slot_job")
        ),
        sa.ForeignKeyConstraint(
            ["schedule"], ["bulwark.schedule.name"], name=op.f("fk_slot_schedule")
        ),
        sa.PrimaryKeyConstraint("schedule", "at", name=op.f("pk_slot")),
        schema="bulwark",
    )
    op.create_index("ix_slot_at", "slot", ["at"], schema="bulwark")


def downgrade() -> None:
    op.drop_table("slot", schema="bulwark")
    op.drop_table("schedule", schema="bulwark")
